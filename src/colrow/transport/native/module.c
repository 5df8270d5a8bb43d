/* The Python module: one type, whose methods release the interpreter while they wait and move data.
 * Tensors come as addresses: whoever calls this has checked their dtype, size and contiguity. */
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <errno.h>
#include <unistd.h>

#include "group.h"

/* Of what Python calls here: an extension that was built for other Python code is not used. */
enum { INTERFACE_VERSION = 2 };

typedef struct {
  PyObject_HEAD
  group_t group;
  PyObject *tick; /* called while waiting; returns the timeout in seconds */
  pthread_mutex_t mutex; /* held during a collective, and when the memory is unmapped */
  PyThreadState *released;
  int is_open;
  int leaves; /* once the collective under way is over: closed by a signal handler that came within it */
} Group;

/* Called from within a wait, without the interpreter's lock. */
static int tick(group_t *group) {
  Group *self = group->owner;
  PyEval_RestoreThread(self->released);
  int raised = PyErr_CheckSignals();
  if (!raised) {
    PyObject *timeout = PyObject_CallNoArgs(self->tick);
    raised = !timeout || ((group->timeout = PyFloat_AsDouble(timeout)) == -1.0 && PyErr_Occurred());
    Py_XDECREF(timeout);
  }
  self->released = PyEval_SaveThread();
  return raised;
}

/* Before a collective: one thread after the other. A signal handler that runs while this thread waits in a
 * collective would wait for itself. */
static enum outcome enter(Group *self) {
  if (group_is_forked(&self->group)) return FORKED;
  if (pthread_mutex_lock(&self->mutex) == EDEADLK) return NESTED;
  if (self->is_open) return DONE;
  pthread_mutex_unlock(&self->mutex);
  return CLOSED;
}

/* With the mutex: the last use of the memory. */
static void release(Group *self) {
  if (!self->is_open) return;
  self->is_open = 0;
  arena_unmap(&self->group.layout, self->group.header);
  close(self->group.file); /* and with it goes the lock that says that this rank lives */
}

/* Run a collective; the outcome as a number, or NULL where a signal handler has raised. */
#define RUN(self, expression)                                              \
  do {                                                                     \
    PyThreadState *released_ = PyEval_SaveThread();                        \
    enum outcome outcome_ = enter(self);                                   \
    if (outcome_ == DONE) {                                                \
      (self)->released = released_;                                        \
      outcome_ = (expression);                                             \
      released_ = (self)->released;                                        \
      if ((self)->leaves) release(self);                                   \
      pthread_mutex_unlock(&(self)->mutex);                                \
    } else if (outcome_ != NESTED) {                                       \
      (self)->group.problem = (problem_t){.outcome = outcome_, .rank = (self)->group.rank}; \
    }                                                                      \
    PyEval_RestoreThread(released_);                                       \
    if (outcome_ == INTERRUPTED && PyErr_Occurred()) return NULL;          \
    return PyLong_FromLong(outcome_);                                      \
  } while (0)

static void *address(PyObject *number) { return PyLong_AsVoidPtr(number); }

/* Counts per rank from a tuple, or NULL and one count from a number. Returns -1 if neither. */
static int read_counts(Group *self, PyObject *object, size_t *counts, const size_t **given, size_t *count) {
  if (PyLong_Check(object)) {
    *given = NULL;
    *count = PyLong_AsSize_t(object);
    return PyErr_Occurred() ? -1 : 0;
  }
  if (!PyTuple_Check(object) || PyTuple_GET_SIZE(object) != self->group.ranks) {
    PyErr_SetString(PyExc_TypeError, "counts must be a number or a tuple with one for each rank");
    return -1;
  }
  for (int rank = 0; rank < self->group.ranks; rank++)
    counts[rank] = PyLong_AsSize_t(PyTuple_GET_ITEM(object, rank));
  *given = counts;
  *count = 0;
  return PyErr_Occurred() ? -1 : 0;
}

/* Six bits of what the ranks compare tell the dtype. */
static int can_compare(long dtype) { return dtype >= 0 && dtype < 64; }

static int expect(Py_ssize_t got, Py_ssize_t wanted) {
  if (got == wanted) return 0;
  PyErr_Format(PyExc_TypeError, "takes %zd arguments, got %zd", wanted, got);
  return -1;
}

static PyObject *all_reduce(Group *self, PyObject *const *arguments, Py_ssize_t number) {
  if (expect(number, 5)) return NULL;
  const void *input = address(arguments[0]);
  void *output = address(arguments[1]);
  size_t count = PyLong_AsSize_t(arguments[2]);
  long dtype = PyLong_AsLong(arguments[3]), reduction = PyLong_AsLong(arguments[4]);
  if (PyErr_Occurred()) return NULL;
  if (!can_reduce(dtype, reduction)) return PyLong_FromLong(REFUSED);
  RUN(self, group_all_reduce(&self->group, input, output, count, dtype, reduction));
}

static PyObject *reduce_scatter(Group *self, PyObject *const *arguments, Py_ssize_t number) {
  size_t counts[MAX_RANKS], count;
  const size_t *given;
  if (expect(number, 5)) return NULL;
  const void *input = address(arguments[0]);
  void *output = address(arguments[1]);
  if (read_counts(self, arguments[2], counts, &given, &count)) return NULL;
  long dtype = PyLong_AsLong(arguments[3]), reduction = PyLong_AsLong(arguments[4]);
  if (PyErr_Occurred()) return NULL;
  if (!can_reduce(dtype, reduction)) return PyLong_FromLong(REFUSED);
  RUN(self, group_reduce_scatter(&self->group, input, output, given, count, dtype, reduction));
}

static PyObject *all_gather(Group *self, PyObject *const *arguments, Py_ssize_t number) {
  size_t counts[MAX_RANKS], count;
  const size_t *given;
  if (expect(number, 4)) return NULL;
  const void *input = address(arguments[0]);
  void *output = address(arguments[1]);
  long dtype = PyLong_AsLong(arguments[3]);
  if (PyErr_Occurred() || read_counts(self, arguments[2], counts, &given, &count)) return NULL;
  if (!can_compare(dtype)) return PyLong_FromLong(REFUSED);
  RUN(self, group_all_gather(&self->group, input, output, given, count, (uint32_t)dtype));
}

static PyObject *all_to_all(Group *self, PyObject *const *arguments, Py_ssize_t number) {
  size_t counts[2][MAX_RANKS], count;
  const size_t *given, *taken;
  if (expect(number, 5)) return NULL;
  const void *input = address(arguments[0]);
  void *output = address(arguments[1]);
  long dtype = PyLong_AsLong(arguments[4]);
  if (PyErr_Occurred() || read_counts(self, arguments[2], counts[0], &given, &count)) return NULL;
  for (int rank = 0; !given && rank < self->group.ranks; rank++) counts[0][rank] = count;
  if (read_counts(self, arguments[3], counts[1], &taken, &count)) return NULL;
  for (int rank = 0; !taken && rank < self->group.ranks; rank++) counts[1][rank] = count;
  if (!can_compare(dtype)) return PyLong_FromLong(REFUSED);
  RUN(self, group_all_to_all(&self->group, input, output, counts[0], counts[1], (uint32_t)dtype));
}

static PyObject *barrier(Group *self, PyObject *none) {
  (void)none;
  RUN(self, group_barrier(&self->group));
}

static PyObject *describe_call(const call_t *call) {
  return Py_BuildValue("(IIIK)", call->operation, call->dtype, call->reduction,
                       (unsigned long long)call->count);
}

static PyObject *problem(Group *self, PyObject *none) {
  (void)none;
  const problem_t *found = &self->group.problem;
  PyObject *calls = found->has_calls
                        ? Py_BuildValue("(NN)", describe_call(&found->mine), describe_call(&found->theirs))
                        : Py_NewRef(Py_None);
  return calls ? Py_BuildValue("(iiiN)", found->outcome, found->rank, found->found_by, calls) : NULL;
}

static void leave(Group *self) {
  if (!self->is_open) return;
  if (group_is_forked(&self->group)) { /* the memory is the parent's: it is not mapped here */
    self->is_open = 0;
    close(self->group.file);
    return;
  }
  group_leave(&self->group); /* a collective under way in another thread ends */
  Py_BEGIN_ALLOW_THREADS
  if (pthread_mutex_lock(&self->mutex) == EDEADLK) {
    self->leaves = 1;
  } else {
    release(self);
    pthread_mutex_unlock(&self->mutex);
  }
  Py_END_ALLOW_THREADS
}

static PyObject *close_group(Group *self, PyObject *none) {
  (void)none;
  leave(self);
  Py_RETURN_NONE;
}

static PyObject *counters(Group *self, PyObject *none) {
  (void)none;
  const group_t *group = &self->group;
  return Py_BuildValue("{sKsKsK}", "spins", (unsigned long long)group->spins, "yields",
                       (unsigned long long)group->yields, "sleeps", (unsigned long long)group->sleeps);
}

/* The caller holds the lock of the rank's byte of the file, which is closed with the group.
 * Group(file, rank, ranks, chunk, slots, one_shot_bytes, spin_seconds, yield_seconds, tick) */
static PyObject *new_group(PyTypeObject *type, PyObject *arguments, PyObject *keywords) {
  int file, rank, ranks;
  Py_ssize_t chunk, one_shot_bytes;
  unsigned slots;
  double spin, yield;
  PyObject *called;
  (void)keywords;
  if (!PyArg_ParseTuple(arguments, "iiinInddO", &file, &rank, &ranks, &chunk, &slots, &one_shot_bytes, &spin,
                        &yield, &called))
    return NULL;
  layout_t layout;
  if (arena_layout(&layout, ranks, (size_t)chunk, slots) || rank < 0 || rank >= ranks) {
    PyErr_Format(PyExc_ValueError, "no group of rank %d of %d with %u slots of %zd bytes", rank, ranks, slots,
                 chunk);
    return NULL;
  }
  header_t *header = arena_map(&layout, file);
  if (!header) return PyErr_SetFromErrno(PyExc_OSError);
  Group *self = (Group *)type->tp_alloc(type, 0);
  if (!self || group_attach(&self->group, header, &layout, file, rank)) {
    arena_unmap(&layout, header);
    Py_XDECREF(self);
    return PyErr_Occurred() ? NULL : PyErr_Format(PyExc_OSError, "not an arena of this version of colrow");
  }
  self->group.one_shot_bytes = (size_t)one_shot_bytes;
  self->group.spin_ns = (int64_t)(spin * 1e9);
  self->group.yield_ns = (int64_t)(yield * 1e9);
  self->group.patience_ns = self->group.spin_ns + self->group.yield_ns;
  self->group.tick = tick;
  self->group.owner = self;
  self->tick = Py_NewRef(called);
  pthread_mutexattr_t kind;
  pthread_mutexattr_init(&kind);
  pthread_mutexattr_settype(&kind, PTHREAD_MUTEX_ERRORCHECK);
  pthread_mutex_init(&self->mutex, &kind);
  pthread_mutexattr_destroy(&kind);
  self->is_open = 1;
  return (PyObject *)self;
}

static int traverse(Group *self, visitproc visit, void *arg) {
  Py_VISIT(Py_TYPE(self));
  Py_VISIT(self->tick);
  return 0;
}

static int clear(Group *self) {
  Py_CLEAR(self->tick);
  return 0;
}

static void deallocate(Group *self) {
  PyTypeObject *type = Py_TYPE(self);
  PyObject_GC_UnTrack(self);
  leave(self);
  clear(self);
  type->tp_free(self);
  Py_DECREF(type);
}

#define FAST(function) (PyCFunction)(void (*)(void))function, METH_FASTCALL

static PyMethodDef methods[] = {
    {"all_reduce", FAST(all_reduce), "(input, output, count, dtype, reduction) -> outcome"},
    {"reduce_scatter", FAST(reduce_scatter), "(input, output, counts, dtype, reduction) -> outcome"},
    {"all_gather", FAST(all_gather), "(input, output, bytes, dtype) -> outcome"},
    {"all_to_all", FAST(all_to_all), "(input, output, bytes given, bytes taken, dtype) -> outcome"},
    {"barrier", (PyCFunction)barrier, METH_NOARGS, "() -> outcome"},
    {"problem", (PyCFunction)problem, METH_NOARGS, "(outcome, rank, found_by, (mine, theirs) or None)"},
    {"counters", (PyCFunction)counters, METH_NOARGS, "how many waits ended while spinning, yielding, asleep"},
    {"close", (PyCFunction)close_group, METH_NOARGS, "leave; the file is closed"},
    {NULL, NULL, 0, NULL},
};

static PyType_Slot slots_of_group[] = {
    {Py_tp_new, new_group},   {Py_tp_dealloc, deallocate}, {Py_tp_traverse, traverse},
    {Py_tp_clear, clear},     {Py_tp_methods, methods},    {0, NULL},
};

static PyType_Spec group_specification = {
    .name = "colrow.transport._native.Group",
    .basicsize = sizeof(Group),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC,
    .slots = slots_of_group,
};

static PyObject *arena_bytes(PyObject *module, PyObject *arguments) {
  int ranks;
  Py_ssize_t chunk;
  unsigned slots;
  layout_t layout;
  (void)module;
  if (!PyArg_ParseTuple(arguments, "inI", &ranks, &chunk, &slots)) return NULL;
  if (arena_layout(&layout, ranks, (size_t)chunk, slots))
    return PyErr_Format(PyExc_ValueError, "no arena of %d ranks with %u slots of %zd bytes", ranks, slots,
                        chunk);
  return PyLong_FromSize_t(layout.bytes);
}

static PyObject *format_arena(PyObject *module, PyObject *arguments) {
  int file, ranks;
  Py_ssize_t chunk;
  unsigned slots;
  layout_t layout;
  (void)module;
  if (!PyArg_ParseTuple(arguments, "iinI", &file, &ranks, &chunk, &slots)) return NULL;
  if (arena_layout(&layout, ranks, (size_t)chunk, slots))
    return PyErr_Format(PyExc_ValueError, "no arena of %d ranks", ranks);
  header_t *header = arena_map(&layout, file);
  if (!header) return PyErr_SetFromErrno(PyExc_OSError);
  group_format(header, &layout);
  arena_unmap(&layout, header);
  Py_RETURN_NONE;
}

static PyMethodDef functions[] = {
    {"arena_bytes", arena_bytes, METH_VARARGS, "(ranks, chunk, slots) -> size of the file in bytes"},
    {"format_arena", format_arena, METH_VARARGS, "(file, ranks, chunk, slots): before anybody attaches"},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, "colrow.transport._native", "Collectives in shared memory.", -1, functions,
    NULL, NULL, NULL, NULL,
};

PyMODINIT_FUNC PyInit__native(void) {
  PyObject *module = PyModule_Create(&definition);
  PyObject *type = module ? PyType_FromSpec(&group_specification) : NULL;
  if (!type || PyModule_AddObjectRef(module, "Group", type) ||
      PyModule_AddIntConstant(module, "VERSION", INTERFACE_VERSION) ||
      PyModule_AddStringConstant(module, "KERNELS", kernel_set()))
    Py_CLEAR(module);
  Py_XDECREF(type);
  if (module) group_watch_forks();
  return module;
}
