"""Every setting of a run, as frozen dataclasses.

Checks inside one section live in its ``__post_init__``; checks across sections in `checks.py`.
Nothing is overwritten after construction; derived numbers are properties. Sizes of the model are in
`model.py`.
"""

from dataclasses import dataclass, field
from typing import Literal

from mmlm.config.model import ModelConfig
from mmlm.errors import require


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How the model is cut; the data-parallel size is what is left of the world."""

    tensor_model_parallel_size: int = 1
    """Ranks that share each layer (TP)."""
    pipeline_model_parallel_size: int = 1
    """Ranks that share the list of layers (PP)."""
    virtual_pipeline_model_parallel_size: int | None = None
    """Chunks of the model on each pipeline rank (VPP): an interleaved schedule, fewer bubbles."""
    sequence_parallel: bool = False
    """Share tokens between the TP ranks outside of attention and MLP (SP); no effect at TP 1."""
    pipeline_layout: str = "auto"
    """Where the flat layer list is cut, e.g. ``vv|vpEt|ttL``; ``auto`` balances the work."""
    overlap_grad_reduce: bool = False
    """Sum gradients over the DP ranks bucket by bucket while the backward pass still runs."""
    overlap_param_gather: bool = False
    """Collect updated weights from the DP ranks while the next forward pass already runs."""
    ddp_bucket_size: int | None = None
    """Parameters in a bucket; None: megatron-core's choice, max(40e6, 1e6 x DP)."""
    timeout_minutes: float = 10.0
    """How long no rank may move on before the run ends and names the one that is behind: 3 times as
    long in the first iteration, 6 times while saving, exporting and evaluating."""

    def __post_init__(self) -> None:
        require(
            "parallel",
            {
                f"{name} {getattr(self, name)} must be at least 1": getattr(self, name) >= 1
                for name in ("tensor_model_parallel_size", "pipeline_model_parallel_size")
            }
            | {
                f"virtual_pipeline_model_parallel_size {self.virtual_pipeline_model_parallel_size} "
                "must be at least 2 and needs pipeline_model_parallel_size of at least 2": (
                    self.virtual_pipeline_model_parallel_size is None
                    or min(
                        self.virtual_pipeline_model_parallel_size,
                        self.pipeline_model_parallel_size,
                    )
                    >= 2
                ),
                f"timeout_minutes {self.timeout_minutes} must be positive": (
                    self.timeout_minutes > 0
                ),
                "overlap_param_gather needs overlap_grad_reduce: the buckets of one are the "
                "other's": self.overlap_grad_reduce or not self.overlap_param_gather,
                f"ddp_bucket_size {self.ddp_bucket_size} must be at least 1, and needs "
                "overlap_grad_reduce": self.ddp_bucket_size is None
                or (self.overlap_grad_reduce and self.ddp_bucket_size >= 1),
            },
        )

    @property
    def num_stages(self) -> int:
        """Rows of the pipeline layout: pipeline ranks times chunks of each."""
        return self.pipeline_model_parallel_size * (self.virtual_pipeline_model_parallel_size or 1)

    @property
    def microbatch_multiple(self) -> int:
        """What the number of microbatches must be a multiple of: PP with virtual stages."""
        interleaved = self.virtual_pipeline_model_parallel_size is not None
        return self.pipeline_model_parallel_size if interleaved else 1

    @property
    def uses_sequence_parallel(self) -> bool:
        """Whether tokens are really shared: SP asked for, and TP ranks to share with."""
        return self.sequence_parallel and self.tensor_model_parallel_size > 1

    @property
    def token_multiple(self) -> int:
        """What the length of a token stream must be a multiple of."""
        return self.tensor_model_parallel_size if self.uses_sequence_parallel else 1


Packing = Literal["pack", "none", "group_by_length", "published"]


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What is trained on and how it is packed."""

    meta: str = ""
    """Path of the meta json that names the sets; relative roots start at the working directory."""
    tokenizer: str = ""
    """Folder with ``tokenizer.model``; empty means the one kept beside the loaded checkpoint."""
    seq_length: int = 2048
    """Tokens in a pack, and the length at which a sample is truncated."""
    cache_dir: str = ""
    """Where length indexes are kept; empty means ``<output_dir>/data_cache``."""
    packing: Packing = "pack"
    """pack: samples share rows. For comparison, one sample a row and rows padded to the longest of
    the microbatch: none (shuffled), group_by_length (HuggingFace's), published (InternVL's)."""
    num_workers: int = 2
    """Processes that measure lengths, and on each rank that decodes images as many; 0: a thread."""
    prefetch_iterations: int = 2
    """Iterations whose batches are made ahead of the training."""
    policy: Literal["strict", "skip"] = "strict"
    """Broken samples stop the run before it starts (strict) or are recorded and left out (skip)."""
    special_literals: Literal["exclude", "tokens"] = "exclude"
    """A text that spells a special token such as ``<img>`` makes its sample broken (exclude), or is
    that token, as published (tokens). ``<box>``, ``<ref>`` and ``<quad>`` always are tokens."""
    seed: int | None = None
    """Seed of the data order and of augmentation; None: ``train.seed``."""

    def __post_init__(self) -> None:
        require(
            "data",
            {
                f"seq_length {self.seq_length} must be at least 8": self.seq_length >= 8,
                f"policy '{self.policy}' must be strict or skip": self.policy in ("strict", "skip"),
                f"packing '{self.packing}' must be pack, none, group_by_length or published": (
                    self.packing in ("pack", "none", "group_by_length", "published")
                ),
                f"special_literals '{self.special_literals}' must be exclude or tokens": (
                    self.special_literals in ("exclude", "tokens")
                ),
                f"num_workers {self.num_workers} must be at least 0": self.num_workers >= 0,
                f"prefetch_iterations {self.prefetch_iterations} must be at least 1": (
                    self.prefetch_iterations >= 1
                ),
                f"seed {self.seed} must be at least 0": self.seed is None or self.seed >= 0,
            },
        )


LossWeight = Literal["token", "sample", "square", "micro_batch_mean"]
Recompute = Literal["none", "selective", "full"]


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Batch, length, precision and what is trained."""

    global_batch_size: int = 512
    """Samples (conversations, not packs) in one iteration."""
    micro_batch_size: int = 1
    """Packs in one microbatch."""
    train_iters: int | None = None
    """Iterations; when not given, `epochs` decides."""
    epochs: int = 1
    """Passes over the data; its last short batch is completed from the start of the epoch."""
    seed: int = 42
    """Seed of the run: of the data order, drop path and fresh weights where they have no own."""
    drop_path_seed: int | None = None
    """Seed of drop path; None: `seed`."""
    init_seed: int | None = None
    """Seed of fresh weights; None: `seed`."""
    deterministic: bool = False
    """Only algorithms that add in a fixed order: the same run twice gives the same bits."""
    dtype: Literal["bf16", "fp32"] = "bf16"
    """Precision of weights and activations; main weights and gradients are always fp32."""
    loss_weight: LossWeight = "token"
    """token: mean over supervised tokens; sample: mean of sample means; square: 1/sqrt(n) each;
    micro_batch_mean: mean over groups of `loss_group_size` samples of their token means."""
    loss_group_size: int = 8
    """Samples in a group of micro_batch_mean: PER_DEVICE_BATCH_SIZE of the published code."""
    vision_drop_path_rate: float = 0.4
    """Drop-path rate of the last vision layer; linear from 0 at the first, per image."""
    vision_drop_path_mode: Literal["skip", "mask"] = "skip"
    """skip: dropped branches are not computed; mask: computed and multiplied by 0."""
    freeze_vision_model: bool = False
    """Leave the vision tower as it is (drop path stays active unless its rate is 0)."""
    freeze_vision_projection: bool = False
    """Leave the projection as it is."""
    freeze_language_model: bool = False
    """Leave the decoder, its embedding and its head as they are."""
    recompute_vision_model: Recompute = "none"
    """Activations of the tower computed again in the backward pass: none, attention only, all."""
    recompute_language_model: Recompute = "none"
    """The same for the decoder. It saves memory and costs time."""
    eval_interval: int = 0
    """Iterations between held-out evaluations; 0 means never."""
    exit_duration_minutes: float = 0.0
    """Minutes from the start of the command after which the run is saved and ends; 0: never."""
    max_nonfinite_iterations: int = 3
    """Iterations in a row whose loss or gradient norm is not finite (each changes nothing) after
    which the run stops."""
    loss_spike_factor: float = 8.0
    """A loss this many robust standard deviations above the median of the last iterations is logged
    with its samples; 0: never."""
    loss_spike_window: int = 100
    """How many last iterations are what is usual for the loss."""

    def __post_init__(self) -> None:
        frozen = (
            self.freeze_vision_model
            and self.freeze_vision_projection
            and self.freeze_language_model
        )
        require(
            "train",
            {
                f"global_batch_size {self.global_batch_size} must be at least 1": (
                    self.global_batch_size >= 1
                ),
                f"micro_batch_size {self.micro_batch_size} must be at least 1": (
                    self.micro_batch_size >= 1
                ),
                f"dtype '{self.dtype}' must be bf16 or fp32": self.dtype in ("bf16", "fp32"),
                f"loss_weight '{self.loss_weight}' must be token, sample, square or "
                "micro_batch_mean": self.loss_weight
                in ("token", "sample", "square", "micro_batch_mean"),
                f"loss_group_size {self.loss_group_size} must be at least 1": (
                    self.loss_group_size >= 1
                ),
                **{
                    f"{name} '{getattr(self, name)}' must be none, selective or full": (
                        getattr(self, name) in ("none", "selective", "full")
                    )
                    for name in ("recompute_vision_model", "recompute_language_model")
                },
                f"vision_drop_path_rate {self.vision_drop_path_rate} must be in [0, 1)": (
                    0.0 <= self.vision_drop_path_rate < 1.0
                ),
                f"vision_drop_path_mode '{self.vision_drop_path_mode}' must be skip or mask": (
                    self.vision_drop_path_mode in ("skip", "mask")
                ),
                "all three parts are frozen: nothing would be trained": not frozen,
                f"train_iters {self.train_iters} must be at least 1": (
                    self.train_iters is None or self.train_iters >= 1
                ),
                f"epochs {self.epochs} must be at least 1": self.epochs >= 1,
                f"exit_duration_minutes {self.exit_duration_minutes} must be at least 0": (
                    self.exit_duration_minutes >= 0
                ),
                **{
                    f"{name} {getattr(self, name)} must be at least 0": (
                        getattr(self, name) is None or getattr(self, name) >= 0
                    )
                    for name in ("seed", "drop_path_seed", "init_seed")
                },
                f"max_nonfinite_iterations {self.max_nonfinite_iterations} must be at least 1": (
                    self.max_nonfinite_iterations >= 1
                ),
                f"loss_spike_factor {self.loss_spike_factor} must be at least 0": (
                    self.loss_spike_factor >= 0
                ),
                f"loss_spike_window {self.loss_spike_window} must be at least 20": (
                    self.loss_spike_window >= 20
                ),
            },
        )


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW and its schedule, as published."""

    lr: float = 1e-5
    """Highest learning rate."""
    min_lr: float = 0.0
    """Learning rate that the cosine ends at."""
    lr_warmup_fraction: float = 0.03
    """Share of the iterations (rounded up) over which the rate rises from exactly 0."""
    weight_decay: float = 0.05
    """Decoupled weight decay."""
    decay: Literal["all", "matrices_only", "huggingface"] = "all"
    """Which parameters decay; the published run decays all."""
    adam_beta1: float = 0.9
    """Decay of the first moment."""
    adam_beta2: float = 0.999
    """Decay of the second moment."""
    adam_eps: float = 1e-8
    """Added outside the root."""
    clip_grad: float = 1.0
    """Largest global gradient norm; 0 means no clipping."""

    def __post_init__(self) -> None:
        require(
            "optimizer",
            {
                f"lr {self.lr} must be positive": self.lr > 0,
                f"min_lr {self.min_lr} must be from 0 to lr {self.lr}": (
                    0.0 <= self.min_lr <= self.lr
                ),
                f"lr_warmup_fraction {self.lr_warmup_fraction} must be in [0, 1)": (
                    0.0 <= self.lr_warmup_fraction < 1.0
                ),
                f"weight_decay {self.weight_decay} must be at least 0": self.weight_decay >= 0,
                f"adam_beta1 {self.adam_beta1} must be in [0, 1)": 0.0 <= self.adam_beta1 < 1.0,
                f"adam_beta2 {self.adam_beta2} must be in [0, 1)": 0.0 <= self.adam_beta2 < 1.0,
                f"clip_grad {self.clip_grad} must be at least 0": self.clip_grad >= 0,
                f"decay '{self.decay}' must be all, matrices_only or huggingface": (
                    self.decay in ("all", "matrices_only", "huggingface")
                ),
            },
        )


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """What a run starts from and what it leaves."""

    load: str = ""
    """Checkpoint to take weights from when there is nothing to resume; empty: fresh weights."""
    load_hf: str = ""
    """The same from HuggingFace weights as they are: a combined InternVL-Chat folder, or a folder
    with the parts as ``vision/`` and ``llm/``."""
    resume: bool = True
    """Continue the newest checkpoint in ``output_dir``; False: refuse to start where there is one.
    """
    save_interval: int = 200
    """Iterations between checkpoints; the last iteration is always saved. 0: only the last."""
    async_save: bool = True
    """Whether the training goes on while a checkpoint is written: it stands still only while the
    tensors are copied to host memory. False: until the checkpoint is complete."""
    save_total_limit: int = 3
    """Newest checkpoints kept; older ones are deleted after a new one is complete, and never the
    newest complete one. 0: all."""
    verify: bool = True
    """Whether the checksums of a checkpoint's files are compared before it is loaded; their sizes
    always are. Reads every byte once more, shared out over the ranks."""
    export_hf_interval: int = 0
    """Iterations between exports: a combined HuggingFace folder in ``<output_dir>/hf``, also after
    the last iteration, of which as many stay as `save_total_limit` says. 0: none."""

    def __post_init__(self) -> None:
        require(
            "checkpoint",
            {
                "load and load_hf are both given: weights come from one of them": not (
                    self.load and self.load_hf
                ),
                f"save_interval {self.save_interval} must be at least 0": self.save_interval >= 0,
                f"save_total_limit {self.save_total_limit} must be at least 0": (
                    self.save_total_limit >= 0
                ),
                f"export_hf_interval {self.export_hf_interval} must be at least 0": (
                    self.export_hf_interval >= 0
                ),
            },
        )


@dataclass(frozen=True, kw_only=True)
class BackendConfig:
    """Which implementations are used; resolved once at start and printed."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: CUDA where there is a device, otherwise CPU with gloo."""
    transformer_impl: Literal["auto", "local", "transformer_engine"] = "auto"
    """Linear layers and norms: megatron-core's own and ours (local) or transformer-engine's."""
    attention_backend: Literal["auto", "sdpa", "flash", "transformer_engine"] = "auto"
    """Packed attention: torch SDPA by segments, flash-attn varlen, or transformer-engine."""


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """One run: what a recipe function returns."""

    output_dir: str = "work_dirs/run"
    """Checkpoints, metrics.jsonl, TensorBoard files, the plot and the resolved config go here."""
    model: ModelConfig | None = None
    """None: read from the checkpoint in ``checkpoint.load``."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    eval_meta: str = ""
    """Meta json of a held-out split; empty means no evaluation."""
    train: TrainConfig = field(default_factory=TrainConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    backend: BackendConfig = field(default_factory=BackendConfig)

    @property
    def data_seed(self) -> int:
        """Seed of the data order and of augmentation."""
        return self.train.seed if self.data.seed is None else self.data.seed

    @property
    def drop_path_seed(self) -> int:
        """Seed of drop path."""
        return self.train.seed if self.train.drop_path_seed is None else self.train.drop_path_seed

    @property
    def init_seed(self) -> int:
        """Seed of fresh weights."""
        return self.train.seed if self.train.init_seed is None else self.train.init_seed
