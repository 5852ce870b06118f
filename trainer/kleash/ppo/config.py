"""Configuration of ``kleash ppo``."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, Self

import pydantic

from kleash.base.config import Config, RunId
from kleash.base.trace_setup import TrainerTracingConfig
from kleash.ppo.keep_config import CheckpointConfig, RecordConfig, SamplesConfig
from kleash.rpc.server import ServerConfig
from kleash.sinks.config import SinksConfig


class ServicesConfig(Config):
    """Where the three services are."""

    policy: tuple[str, ...] = ("127.0.0.1:50051",)
    """Addresses of the policy replicas, host:port, as a list or with commas; they share a batch.
    With another discovery than static one address, that of a headless Service or of any name with
    an address for each replica."""
    discovery: Literal["static", "dns", "endpoint_slices"] = "static"
    """How replicas are found. static: those named in policy, all of them at start. dns: every
    address of the name in policy, looked up again and again. endpoint_slices: the endpoints of that
    Service, watched at the Kubernetes API, or dns where that cannot be asked. With the last two
    replicas may come and go in the middle of a run, which goes on with those that are there."""
    reward: str = "127.0.0.1:50052"
    """Address of the reward service."""
    reference: str = "127.0.0.1:50053"
    """Address of the reference service; the reward service's when one process hosts both."""
    new_reward_model: Literal["refuse", "adopt"] = "refuse"
    """When the reward service serves another model than the run began with: end the run, or go on
    with it. A step is scored by one model alone, also while replicas of both answer. Until it is
    given back, a model that the service holds beside a newer one serves a run that refuses."""
    calibration: Literal["none", "affine"] = "none"
    """Scores of a model that is adopted: as they are, or scale * score + shift with the mean and
    the standard deviation that the scores of the model before have on the run's newest
    responses."""
    calibration_samples: int = pydantic.Field(default=256, ge=8)
    """The run's newest responses that are kept, in checkpoints too, for calibration."""
    wait_s: float = pydantic.Field(default=120.0, ge=0)
    """Seconds to wait for a service that does not answer, at start and in the middle of a run."""
    generate_timeout_s: float = pydantic.Field(default=600.0, gt=0)
    """Deadline of one Generate call, which carries a replica's share of the batch."""
    score_timeout_s: float = pydantic.Field(default=120.0, gt=0)
    """Deadline of one call to the reward or the reference service."""
    group_size: int = pydantic.Field(default=16, ge=1)
    """Finished responses that go to the reward and the reference service in one call."""

    @pydantic.field_validator("policy", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        return tuple(value.split(",")) if isinstance(value, str) else value

    @pydantic.field_validator("policy")
    @classmethod
    def _need_one(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if not value or not all(value):
            raise ValueError("needs at least one address, host:port")
        return value

    @pydantic.model_validator(mode="after")
    def _one_name_to_discover(self) -> Self:
        if self.discovery != "static" and len(self.policy) != 1:
            raise ValueError(
                f"policy has {len(self.policy)} addresses; with discovery {self.discovery} name "
                "one, that stands for all replicas"
            )
        return self

    @pydantic.model_validator(mode="after")
    def _calibrate_what_is_adopted(self) -> Self:
        if self.calibration != "none" and self.new_reward_model == "refuse":
            raise ValueError(
                f"calibration {self.calibration} has no effect without a new model; set "
                "new_reward_model to adopt"
            )
        return self

    @property
    def is_elastic(self) -> bool:
        """Whether policy replicas may come and go."""
        return self.discovery != "static"


class PublishConfig(Config):
    """How new weights reach the policy replicas; docs/weights.md explains the protocol."""

    server: ServerConfig = ServerConfig()
    """The weights store from which replicas fetch; a port of its own."""
    address: str | None = None
    """Where replicas reach the store, host:port; null is the server's own address."""
    quorum: int | None = pydantic.Field(default=None, ge=1)
    """Replicas that must serve a new version for the run to go on, with those alone until the
    others have caught up; null means all, and one where services.discovery is not static."""
    lease: str | None = None
    """Kubernetes Lease, in the trainer's namespace, that the trainer holds while it publishes, one
    for each fleet of policy replicas: a second trainer is refused while the first one lives. null
    holds none, and a later trainer takes over from an earlier one."""
    in_flight: Literal["drain", "keep", "reprefill", "abort_partial"] = "keep"
    """Responses that are being generated at a commit: end with the old weights first, go on with
    the keys and values they have, go on with new ones, or end where they are."""
    prepare_timeout_s: float = pydantic.Field(default=600.0, gt=0)
    """Time for a replica to fetch and check a version while it serves the old one."""
    commit_timeout_s: float = pydantic.Field(default=120.0, gt=0)
    """Time for a replica to put it in place; with drain, running responses end in it."""
    canary_tokens: int = pydantic.Field(default=16, ge=0)
    """Tokens of the first prompt whose log-probs must agree on trainer and replica after every
    commit; 0 turns the check off."""
    keep_versions: int = pydantic.Field(default=64, ge=1)
    """Deltas that are kept on disk for replicas that fall behind."""
    flat_replicas: int = pydantic.Field(default=8, ge=1)
    """Replicas that fetch from the trainer itself; the others fetch from replicas."""
    peer_fan_out: int = pydantic.Field(default=3, ge=1)
    """Replicas that fetch from one replica."""


class SamplingConfig(Config):
    """How responses are drawn. Policy, trainer and reference use the same temperature."""

    temperature: float = pydantic.Field(default=1.0, gt=0)
    """Softmax temperature of sampling and of every log-probability."""
    max_new_tokens: int = pydantic.Field(default=64, ge=1)
    """Longest response in tokens, the stop token included."""
    stop_token_ids: tuple[int, ...] = ()
    """Ids that end a response; empty means the model's own end-of-sequence ids."""
    top_k: int = 0
    """Must be 0 (off)."""
    top_p: float = 1.0
    """Must be 1 (off)."""

    @pydantic.model_validator(mode="after")
    def _whole_distribution(self) -> Self:
        if self.top_k != 0 or self.top_p != 1:
            raise ValueError(
                f"top_k {self.top_k} and top_p {self.top_p} would draw from another distribution "
                "than the one PPO scores; set top_k to 0 and top_p to 1"
            )
        return self


class AlgorithmConfig(Config):
    """PPO itself; docs/ppo.md holds the formulas."""

    epochs: int = pydantic.Field(default=4, ge=1)
    """Passes over each rollout."""
    minibatches: int = pydantic.Field(default=1, ge=1)
    """Optimizer steps in one pass; divides batch_size."""
    clip_range: float = pydantic.Field(default=0.2, gt=0)
    """The ratio is clipped to 1 - clip_range .. 1 + clip_range."""
    value_clip_range: float | None = pydantic.Field(default=0.2, gt=0)
    """Values are clipped to this distance from the old value; null turns it off."""
    gamma: float = pydantic.Field(default=1.0, ge=0, le=1)
    """Discount per token."""
    lam: float = pydantic.Field(default=0.95, ge=0, le=1)
    """Lambda of generalised advantage estimation."""
    whiten_advantages: bool = True
    """Advantages get mean 0 and variance 1 over the response tokens of the rollout."""
    whiten_rewards: bool = False
    """Divide per-token rewards by their standard deviation; their mean stays."""
    missing_eos: Literal["replace", "subtract", "off"] = "replace"
    """A response without a stop token: score becomes -penalty, loses the penalty, or stays."""
    missing_eos_penalty: float = pydantic.Field(default=1.0, ge=0)
    """The penalty, in units of the normalised score."""
    importance_weight_cap: float | None = pydantic.Field(default=None, gt=0)
    """Weigh tokens by min(old / behaviour probability, cap); 2 is usual. For a policy service of
    another precision or engine (behaviour_gap_max shows it); null means 1 for every token."""
    entropy_coefficient: float = pydantic.Field(default=0.0, ge=0)
    """Weight of the entropy bonus."""
    target_kl: float | None = pydantic.Field(default=None, gt=0)
    """Stop the epochs of a step when approx_kl of an epoch exceeds this; null never does."""


class KLConfig(Config):
    """The leash: beta times the KL divergence from the reference is subtracted from the reward."""

    controller: Literal["fixed", "adaptive"] = "fixed"
    """A constant beta, or one that is steered towards a target KL."""
    coefficient: float = pydantic.Field(default=0.05, ge=0)
    """Beta, or where the adaptive controller starts."""
    target: float | None = pydantic.Field(default=None, gt=0)
    """Adaptive only: wanted KL in nats per sequence."""
    horizon: float | None = pydantic.Field(default=None, gt=0)
    """Adaptive only: episodes in which beta may change by a fifth; null is 1/30 of the run's."""

    @pydantic.model_validator(mode="after")
    def _target_if_adaptive(self) -> Self:
        if self.controller == "adaptive" and (self.target is None or self.coefficient == 0):
            raise ValueError("an adaptive controller needs a target and a coefficient above 0")
        if self.controller == "fixed" and (self.target is not None or self.horizon is not None):
            raise ValueError(
                "target and horizon do nothing with a fixed coefficient; set controller to adaptive"
            )
        return self


class OptimizerConfig(Config):
    """Adam with gradient clipping; the rate changes once a PPO step."""

    learning_rate: float = pydantic.Field(default=3e-6, ge=0)
    """Highest learning rate."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Adam's decay rates."""
    epsilon: float = pydantic.Field(default=1e-5, gt=0)
    """Adam's epsilon."""
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    """How the rate falls over the run."""
    warmup_fraction: float = pydantic.Field(default=0.0, ge=0, lt=1)
    """Share of the steps in which the rate rises."""
    final_fraction: float = pydantic.Field(default=0.0, ge=0, le=1)
    """Share of the highest rate that is left at the end."""
    max_grad_norm: float | None = pydantic.Field(default=1.0, gt=0)
    """Longest gradient; null does not clip."""


class ValueConfig(OptimizerConfig):
    """The value network: its start and its optimizer."""

    learning_rate: float = pydantic.Field(default=1e-5, ge=0)
    """Highest learning rate."""
    init: Literal["reward_model", "policy"] = "reward_model"
    """Weights it starts from; with policy the head starts at zero."""
    warmup_steps: int = pydantic.Field(default=0, ge=0)
    """First steps, out of total_steps, that train the value network alone on the frozen policy."""


class PtxConfig(Config):
    """PPO-ptx (Ouyang et al. 2022): language modelling on other data in every optimizer step."""

    data: str | None = None
    """Demonstrations (see kleash sft); null turns it off."""
    coefficient: float = pydantic.Field(default=0.1, gt=0)
    """Weight of their cross-entropy beside the PPO loss."""
    batch_size: int = pydantic.Field(default=8, ge=1)
    """Demonstrations in one optimizer step."""


class EvaluationConfig(Config):
    """Held-out prompts, sampled with a fixed seed."""

    prompts: str | None = None
    """Prompts, in the formats of prompts; null turns evaluation off."""
    every: int = pydantic.Field(default=10, ge=1)
    """Steps between evaluations; there is one before the first step and one after the last."""
    num_prompts: int = pydantic.Field(default=64, ge=1)
    """The first so many prompts are used."""
    judge: str | None = None
    """module:function of (PromptRecord, response text); returns a number or a dict of numbers."""

    @pydantic.model_validator(mode="after")
    def _judge_needs_prompts(self) -> Self:
        if self.judge is not None and self.prompts is None:
            raise ValueError("judge has no effect without prompts; set evaluation.prompts")
        if self.judge is not None and self.judge.count(":") != 1:
            raise ValueError(f"judge is {self.judge!r}; write it as module:function")
        return self


class PPOConfig(Config):
    """Stage 3: PPO under a KL leash, against running policy, reward and reference services.

    The default learning rates and batch suit models of a billion parameters; models of a million
    learn at 2e-4 (policy) and 1e-3 (value).
    """

    out: Path
    """Run folder: checkpoints, metrics.jsonl, and at the end policy/ and report.json."""
    run_id: RunId = None
    """Name of the run that this stage belongs to, recorded in kleash.json and every checkpoint;
    null makes one."""
    prompts: str
    """Training prompts: a JSON Lines file or a Hugging Face dataset."""
    model: Path
    """Folder of the SFT checkpoint: the policy's start, and what the reference service serves."""
    reward_model: Path | None = None
    """Folder of the reward model, from which the value network starts (see value.init)."""
    services: ServicesConfig = ServicesConfig()
    """Addresses and deadlines."""
    publish: PublishConfig = PublishConfig()
    """How new weights reach the policy replicas."""
    server: ServerConfig = ServerConfig()
    """The trainer's own gRPC service: status, watch, pause, resume, checkpoint, stop."""
    seed: int = pydantic.Field(default=0, ge=0)
    """Of prompt order, sampling and minibatches."""
    total_steps: int = pydantic.Field(default=100, ge=1)
    """PPO steps."""
    batch_size: int = pydantic.Field(default=64, ge=1)
    """Responses of one step, one for each prompt drawn."""
    max_prompt_tokens: int = pydantic.Field(default=512, ge=1)
    """Longest prompt; a longer one is an error."""
    pad_token: str | None = None
    """Text of the pad token, for tokenizers that have none; must be in the vocabulary."""
    chat_template: Path | None = None
    """File with a chat template, for tokenizers that have none and prompts with messages."""
    skip_bad: bool = False
    """Count and skip unusable lines of data instead of stopping at the first."""
    sampling: SamplingConfig = SamplingConfig()
    """How responses are drawn."""
    algorithm: AlgorithmConfig = AlgorithmConfig()
    """PPO itself."""
    kl: KLConfig = KLConfig()
    """The leash."""
    policy: OptimizerConfig = OptimizerConfig()
    """The policy's optimizer."""
    value: ValueConfig = ValueConfig()
    """The value network."""
    ptx: PtxConfig = PtxConfig()
    """Optional language modelling beside PPO."""
    evaluation: EvaluationConfig = EvaluationConfig()
    """Held-out prompts."""
    samples: SamplesConfig = SamplesConfig()
    """Responses that are kept to be read."""
    sinks: SinksConfig = SinksConfig()
    """TensorBoard, Weights & Biases and MLflow, beside the run folder."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """Complete checkpoints."""
    tracing: TrainerTracingConfig = TrainerTracingConfig()
    """Spans of steps, for who looks for lost time."""
    record: RecordConfig = RecordConfig()
    """Steps that are recorded with all requests and replies."""
    micro_batch_tokens: int = pydantic.Field(default=8192, ge=1)
    """Padded tokens of one forward and backward pass; the losses do not depend on it."""
    isolate_scoring: bool = True
    """Ask the services to compute the trainer's requests in passes of their own, so that the same
    request gives the same bits whatever else they serve; false shares passes with other callers."""
    device: str = "cpu"
    """Torch device of policy and value network; their weights are float32."""
    num_threads: int = pydantic.Field(default=0, ge=0)
    """Threads that torch computes with; 0 leaves its own choice."""
    resume: bool = False
    """Go on from the newest complete checkpoint in the run folder, or start when there is none."""

    @pydantic.model_validator(mode="after")
    def _check(self) -> Self:
        if self.batch_size % self.algorithm.minibatches:
            raise ValueError(
                f"batch_size {self.batch_size} is not a multiple of algorithm.minibatches "
                f"{self.algorithm.minibatches}; choose one that divides it"
            )
        if self.value.init == "reward_model" and self.reward_model is None:
            raise ValueError(
                "reward_model is required: the value network starts from it (see value.init)"
            )
        if self.value.warmup_steps >= self.total_steps:
            raise ValueError(
                f"value.warmup_steps {self.value.warmup_steps} leaves none of the "
                f"{self.total_steps} total_steps to PPO"
            )
        if (last := max(self.record.steps, default=0)) > self.total_steps:
            raise ValueError(
                f"record.steps names {last}, and the run has {self.total_steps} total_steps"
            )
        num_replicas, quorum = len(self.services.policy), self.publish.quorum
        if quorum is not None and not self.services.is_elastic and quorum > num_replicas:
            raise ValueError(
                f"publish.quorum is {quorum}, and services.policy names {num_replicas} replicas; "
                "lower it or name more replicas"
            )
        return self

    @property
    def quorum(self) -> int | None:
        """Replicas that must serve a new version; None means all that there are."""
        return self.publish.quorum or (1 if self.services.is_elastic else None)

    @property
    def kl_horizon(self) -> float:
        """Episodes of the adaptive controller; with 1/30 of the run's beta can move within it."""
        return self.kl.horizon or max(self.total_steps * self.batch_size / 30, 1.0)

    @property
    def traces(self) -> Path:
        """Folder for the files of traces."""
        return self.out / "traces"

    @property
    def max_sequence_tokens(self) -> int:
        """Longest prompt plus longest response."""
        return self.max_prompt_tokens + self.sampling.max_new_tokens
