"""Recording a model once on meta tensors: operators, the modules and calls they belong to, integers."""

from colrow.trace.errors import TraceError
from colrow.trace.records import Trace
from colrow.trace.run import Example, trace, trace_all, trace_together

__all__ = ["Example", "Trace", "TraceError", "trace", "trace_all", "trace_together"]
