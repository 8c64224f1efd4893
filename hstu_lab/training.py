"""Training: next-item sampled softmax, and the task heads on candidates, without a label leak.

The last event of every user is held out for `hstu_lab.evaluation`; everything before it trains. Every random choice is a
function of (seed, step), so that a resumed run goes on where it stopped, bit by bit on the CPU.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import json
import math
import pathlib
import shlex
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from hstu_lab import environment
from hstu_lab.config import ModelConfig
from hstu_lab.evaluation import Markov, MostPopular, TrainingError, compare, evaluate, evaluate_baseline, hidden_states
from hstu_lab.events import EventLog, task_labels
from hstu_lab.model import HSTU, save_checkpoint
from hstu_lab.tables import parameter_groups
from hstu_lab.tokens import pack, quantise_gaps, user_token

__all__ = [
    "Corpus", "Markov", "MostPopular", "Trainer", "TrainingError", "TrainingResult", "candidate_logits", "compare", "evaluate",
    "evaluate_baseline", "fit_config", "learning_rate_factor", "next_item_loss", "ranking_loss", "train",
]  # fmt: skip

BATCH_SIZE = {"cpu": 8, "cuda": 64}
"""Users of a batch. Of 8, 16 and 64, eight learn most per second of a CPU; the number for a GPU is not tuned."""
LEARNING_RATE = 3e-3
NUM_NEGATIVES = 1024
RANKING_SHARE, RANKING_WEIGHT = 0.2, 4.0
"""Share of the steps that train the task heads on candidates, the others train the next item; factor of their loss, whose
gradients would else drown in those of a softmax at temperature 0.05."""
RANKING_CANDIDATES = 64
ACTION_DROPOUT, USER_DROPOUT = 0.2, 0.1
"""Share of events and users made unknown (0) in training, so that generated items and new users are no surprise later."""
WARM_UP = 0.02
"""Share of the run in which the learning rate climbs; a cosine then takes it to zero."""
SAVE_EVERY = 60.0
"""Seconds between two saves of the resumable state."""
STATE_FILE = pathlib.Path("resume", "state.safetensors")


@dataclasses.dataclass(frozen=True)
class TrainingResult:
    """What `train` did, from the run's start.

    `losses` are running means of "next item" and "heads". `metrics` is what `evaluation.compare` returned; empty if Ctrl-C
    ended the run.
    """

    folder: pathlib.Path
    steps: int
    seconds: float
    losses: dict[str, float]
    metrics: dict[str, dict[str, float]]
    interrupted: bool

    def to_dict(self) -> dict:
        return {**dataclasses.asdict(self), "folder": str(self.folder)}

    def __str__(self) -> str:
        done = f"{self.folder}: {self.steps:,} steps in {self.seconds:.0f} s"
        if self.interrupted:
            return f"{done}, interrupted; train again with resume to go on"
        return f"{done}; HR@10 " + ", ".join(f"{name} {values['HR@10']:.4f}" for name, values in self.metrics.items())


# ---- data


def fit_config(config: ModelConfig, log: EventLog) -> ModelConfig:
    """`config` with the item rows of the log's catalog.

    Raises TrainingError where the users outnumber their rows, ConfigError where the items would need tokens over 31 bits.
    """
    if config.num_users and len(log) >= config.num_users:
        raise TrainingError(
            f"num_users is {config.num_users:,}, rows for {config.num_users - 1:,} users and the unknown one, the log has "
            f"{len(log):,}: set num_users to {len(log) + 1:,}, or to 0 for a model without user rows, like presets ml-1m and "
            "ml-1m-large"
        )
    return config.replace(num_items=log.catalog.num_items)


class Corpus:
    """The events of a log as tokens, in padded batches, without the last event of each user.

    `tokens` (T,) int64 and `labels` (T, 3) float32 of all events, user after user; `users` are those with enough of them.
    """

    def __init__(self, log: EventLog, config: ModelConfig):
        self.config = config
        self.starts, self.ends = log.offsets[:-1], log.offsets[1:] - 1
        spans = zip(log.offsets[:-1], log.offsets[1:])
        levels = [quantise_gaps(log.timestamps[start:end].tolist(), config.num_time_levels) for start, end in spans]
        self.tokens = pack(log.items, log.actions, np.concatenate([log.items[:0], *levels]), config)
        self.labels = task_labels(log)
        fewest = 2 - config.num_context
        self.users = np.flatnonzero(self.ends - self.starts >= fewest)
        if not len(self.users):
            raise TrainingError(f"events: no user has {fewest + 1} events, the last to be held out; give longer histories")

    def batches(self, seed: int, epoch: int, batch_size: int) -> list[np.ndarray]:
        """The users of one epoch, in batches of like length, in random order."""
        rng = np.random.default_rng([seed, epoch])
        pools = np.array_split(rng.permutation(self.users), -(-len(self.users) // (16 * batch_size)))
        pools = [pool[np.argsort(self.ends[pool] - self.starts[pool], kind="stable")] for pool in pools]
        batches = [batch for pool in pools for batch in np.split(pool, range(batch_size, len(pool), batch_size))]
        return [batches[i] for i in rng.permutation(len(batches))]

    def batches_from(self, step: int, seed: int, batch_size: int) -> Iterator[np.ndarray]:
        """The users of every step from `step` on, without end."""
        epoch, done = divmod(step, len(self.batches(seed, 0, batch_size)))
        while True:
            yield from self.batches(seed, epoch, batch_size)[done:]
            epoch, done = epoch + 1, 0

    def next_items(self, users: np.ndarray, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        """Tokens (B, S) and lengths (B,) of the users' latest events; each token is to be predicted from those before it."""
        return self._pad(users, self.ends[users], rng)

    def ranking(self, users: np.ndarray, rng: np.random.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Histories cut at random, tokens (B, S) and lengths (B,); the items (B, C) of the events after the cut, and their
        labels (B, C, 3). Where a user has fewer, item 0 and NaN."""
        cuts = rng.integers(self.starts[users] + 1 - self.config.num_context, self.ends[users])
        events = cuts[:, None] + np.arange(RANKING_CANDIDATES)
        exists = events < self.ends[users][:, None]
        events = np.where(exists, events, 0)
        items = torch.from_numpy(np.where(exists, self.tokens[events] % self.config.num_items, 0))
        labels = torch.from_numpy(np.where(exists[..., None], self.labels[events], np.float32("nan")))
        return *self._pad(users, cuts, rng), items, labels

    def _pad(self, users: np.ndarray, ends: np.ndarray, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        context = self.config.num_context
        starts = np.maximum(self.starts[users], ends - self.config.max_history)
        lengths = ends - starts + context
        padded = np.zeros((len(users), lengths.max()), np.int64)
        for row, start, end in zip(padded, starts, ends):
            row[context : context + end - start] = self.tokens[start:end]
        action = padded // self.config.num_items % self.config.num_actions
        padded -= self.config.num_items * action * (rng.random(padded.shape) < ACTION_DROPOUT)
        if context:
            padded[:, 0] = user_token(np.where(rng.random(len(users)) < USER_DROPOUT, 0, users + 1), self.config)
        return torch.from_numpy(padded), torch.from_numpy(lengths)


# ---- losses


def next_item_loss(model: HSTU, tokens: Tensor, lengths: Tensor, negatives: Tensor) -> Tensor:
    """Sampled softmax of every token's item against `negatives` (n,), shared by the batch; logits as in `HSTU.logits`.

    tokens (B, S) right-padded, lengths (B,). A negative that is the target itself does not count.
    """
    hidden = hidden_states(model, tokens, lengths)
    real = torch.arange(hidden.shape[1], device=tokens.device) < (lengths - 1).unsqueeze(-1)
    rows = real.flatten().nonzero().squeeze(1)
    query = F.normalize(hidden.flatten(0, 1).index_select(0, rows), dim=-1) / model.config.temperature
    target = tokens[:, 1:].flatten()[rows] % model.config.num_items
    items = model.item_matrix()
    positive = (query * F.embedding(target, items)).sum(-1)
    scores = query @ F.embedding(negatives, items).t()
    scores = scores.masked_fill(target.unsqueeze(-1) == negatives, -torch.inf)
    return F.softplus(scores.logsumexp(1) - positive).mean()


def candidate_logits(model: HSTU, tokens: Tensor, lengths: Tensor, items: Tensor) -> Tensor:
    """Task logits (B, C, 3) of bare items (B, C) after right-padded histories (B, S) of `lengths` (B,): what serving computes."""
    both = torch.cat([tokens, items], dim=1)
    offsets = torch.arange(len(both) + 1, device=tokens.device) * both.shape[1]
    x = model.embed(both.flatten(), offsets).unflatten(0, both.shape)
    times = model.times(both.flatten(), offsets).view(both.shape)
    return model.heads(model.stack.candidates(x, lengths, tokens.shape[1], times)[:, tokens.shape[1] :])


def ranking_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean binary cross-entropy of logits (..., 3) against the labels (..., 3) that are not NaN; 0 if all are."""
    known = ~labels.isnan()
    losses = F.binary_cross_entropy_with_logits(logits, labels.nan_to_num(), reduction="none")
    return losses[known].sum() / known.sum().clamp(min=1)


# ---- the run


class Trainer:
    """Model, optimizer and progress of one run; `identity` is what a resumed run must share with the first."""

    def __init__(
        self, config: ModelConfig, log: EventLog, *, seed: int = 0, batch_size: int | None = None, lr: float = LEARNING_RATE
    ):
        self.config, self.seed, self.lr = fit_config(config, log), seed, lr
        self.corpus = Corpus(log, self.config)
        self.device = prove_room(self.config)
        self.batch_size = batch_size or BATCH_SIZE[self.device.type]
        torch.manual_seed(seed)
        self.model = HSTU(self.config)
        self.model.tables.item_features.copy_(torch.from_numpy(log.catalog.item_features(self.config)))
        self.model.known_items.copy_(torch.from_numpy(log.catalog.known))
        self.model.to(self.device).train()
        self.known = self.model.known_items.nonzero().squeeze(1)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.0, fused=True)
        self.identity = {
            "catalog": log.catalog.name, "users": len(log), "events": log.num_events, "seed": seed, "lr": lr,
            "batch_size": self.batch_size, **json.loads(self.config.to_json()),
        }  # fmt: skip
        self.steps, self.seconds, self.losses = 0, 0.0, {}

    def step(self, users: np.ndarray, used: float) -> float:
        """One update on a batch of users once the share `used` of the run is over. Returns the loss.

        Raises TrainingError where the loss is not finite; the parameters are then as before.
        """
        rng = np.random.default_rng([self.seed, self.steps, 1])
        torch.manual_seed(int(rng.integers(2**62)))
        task = "heads" if rng.random() < RANKING_SHARE else "next item"
        if task == "heads":
            tokens, lengths, items, labels = (part.to(self.device) for part in self.corpus.ranking(users, rng))
            loss = RANKING_WEIGHT * ranking_loss(candidate_logits(self.model, tokens, lengths, items), labels)
        else:
            tokens, lengths = (part.to(self.device) for part in self.corpus.next_items(users, rng))
            drawn = torch.from_numpy(rng.integers(len(self.known), size=NUM_NEGATIVES))
            loss = next_item_loss(self.model, tokens, lengths, self.known[drawn.to(self.device)])
        value = loss.item() / (RANKING_WEIGHT if task == "heads" else 1)
        if not math.isfinite(value):
            raise TrainingError(f"lr is {self.lr}: the loss of step {self.steps + 1:,} is {value}; train with a lower one")
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr * learning_rate_factor(used)
        self.optimizer.step()
        self.steps += 1
        self.losses[task] = value + 0.98 * (self.losses.get(task, value) - value)
        return value

    def save(self, folder: pathlib.Path) -> None:
        """Write weights and moments and, as JSON in their metadata, identity and progress: one file, replaced at once."""
        tensors = {f"model.{name}": tensor for name, tensor in self.model.state_dict().items()}
        for index, moments in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{name}": tensor for name, tensor in moments.items()}
        progress = {"steps": self.steps, "seconds": self.seconds, "losses": self.losses}
        path = folder / STATE_FILE
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".part")
        metadata = {"identity": json.dumps(self.identity), "progress": json.dumps(progress)}
        save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, partial, metadata)
        partial.replace(path)

    def load(self, folder: pathlib.Path) -> None:
        """Go on from what `save` wrote. Raises TrainingError where there is nothing, or where it was another run's."""
        path = folder / STATE_FILE
        if not path.is_file():
            raise TrainingError(f"{path}: no such file, so there is nothing to resume; train without resume")
        try:
            with safe_open(path, framework="pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - safe_open is no mapping
                identity, progress = (json.loads(file.metadata()[name]) for name in ("identity", "progress"))
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            raise TrainingError(f"{path}: cannot be read ({error}); train without resume") from error
        for field, now in self.identity.items():
            if identity.get(field) != now:
                raise TrainingError(f"{path}: {field} was {identity.get(field)}, now {now}; keep it, or train without resume")
        moments: dict[int, dict[str, Tensor]] = {}
        for name in [name for name in tensors if name.startswith("optimizer.")]:
            _, index, moment = name.split(".")
            moments.setdefault(int(index), {})[moment] = tensors.pop(name)
        self.model.load_state_dict({name.removeprefix("model."): tensor for name, tensor in tensors.items()})
        self.optimizer.load_state_dict({"state": moments, "param_groups": self.optimizer.state_dict()["param_groups"]})
        self.steps, self.seconds, self.losses = (progress[field] for field in ("steps", "seconds", "losses"))


def learning_rate_factor(used: float) -> float:
    """Factor of the learning rate once the share `used` of the run is over."""
    if used < WARM_UP:
        return used / WARM_UP
    return 0.5 + 0.5 * math.cos(math.pi * (used - WARM_UP) / (1 - WARM_UP))


def train(
    config: ModelConfig,
    log: EventLog,
    out: str | pathlib.Path,
    *,
    minutes: float | None = None,
    steps: int | None = None,
    seed: int = 0,
    resume: bool = False,
    progress: bool = True,
    batch_size: int | None = None,
    lr: float = LEARNING_RATE,
    on_step: Callable[[int, float], None] | None = None,
) -> TrainingResult:
    """Train a model of `config` on `log` for `minutes` or `steps` (of both, the first to end) and write it to the folder `out`.

    Writes model.safetensors, config.json, catalog.json, users.json (the id of every user row from 1 on), training.json
    (metrics of model and baselines, command, versions) and resume/state.safetensors. The evaluation comes after the minutes;
    the progress bar's HR@10 is of the held-out events of 200 users, and nothing is chosen by it.
    Ctrl-C ends the run after the step at hand: everything is saved, the metrics stay empty, and `resume=True` with the same
    arguments goes on from there, minutes and steps counted from the run's very start. batch_size: users of a batch (default:
    `BATCH_SIZE` of the device). `on_step(steps, loss)` is called after each step. Raises TrainingError, ConfigError or
    EventsError before the first step where config and log do not fit, `out` cannot be written or there is nothing to resume.
    """
    if minutes is None and steps is None:
        raise TrainingError("minutes and steps are both missing: give one of them")
    for name, value in (("minutes", minutes), ("steps", steps), ("batch_size", batch_size), ("lr", lr)):
        if value is not None and not 0 < value < math.inf:
            raise TrainingError(f"{name} is {value}: give a positive number")
    if seed < 0:
        raise TrainingError(f"seed is {seed}: give 0 or more")
    out = pathlib.Path(out)
    if not resume:
        _prove_writable(out)
    with torch.random.fork_rng(), _ctrl_c() as interrupted:
        trainer = Trainer(config, log, seed=seed, batch_size=batch_size, lr=lr)
        if resume:
            trainer.load(out)
        _run(trainer, log, out, minutes, steps, interrupted, progress, on_step)
        trainer.save(out)
        save_checkpoint(trainer.model.eval(), out)
        log.catalog.save(out / "catalog.json")
        (out / "users.json").write_text(json.dumps(list(log.users)) + "\n")
        metrics = {} if interrupted.is_set() else compare(trainer.model, log)
    result = TrainingResult(out, trainer.steps, trainer.seconds, trainer.losses, metrics, interrupted.is_set())
    (out / "training.json").write_text(json.dumps(_account(result, trainer), indent=1) + "\n")
    return result


def prove_room(config: ModelConfig) -> torch.device:
    """The device to train on: a GPU where there is one.

    Raises TrainingError where its memory cannot hold the model and its optimizer, before the kernel ends the process without a
    word.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    cuda = device.type == "cuda"
    room = torch.cuda.get_device_properties(device).total_memory if cuda else environment.memory_bytes()
    count = sum(group.count for group in parameter_groups(config))
    needed = 4 * 4 * count  # fp32: weights, gradients and AdamW's two moments
    if needed > room:
        raise TrainingError(
            f"preset {config.preset}: to train its {count:,} parameters takes {needed / 2**30:,.1f} GiB of {device.type} memory "
            f"with gradients and moments, there are {room / 2**30:,.1f}: choose a smaller preset"
        )
    return device


def _prove_writable(out: pathlib.Path) -> None:
    """Makes the folder. Found out before the minutes are spent, not after."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
    except OSError as error:
        raise TrainingError(f"out is {out}: cannot be written ({error.strerror}); give a folder that can") from error


def _run(trainer: Trainer, log: EventLog, out: pathlib.Path, minutes, steps, interrupted, progress, on_step) -> None:
    sample = np.random.default_rng(trainer.seed).permutation(trainer.corpus.users)[:200]
    batches = trainer.corpus.batches_from(trainer.steps, trainer.seed, trainer.batch_size)
    began, saved, shown, hit_rate = time.perf_counter() - trainer.seconds, trainer.seconds, 0.1, ""
    with tqdm(total=100, desc="training", disable=not progress, bar_format="{desc} {percentage:3.0f}%|{bar}|{postfix}") as bar:
        while not interrupted.is_set():
            used = max(trainer.seconds / (60 * minutes) if minutes else 0, trainer.steps / steps if steps else 0)
            bar.update(min(100 * used, 100) - bar.n)
            if used >= 1:
                break
            loss = trainer.step(next(batches), used)
            if on_step:
                on_step(trainer.steps, loss)
            if progress and used >= shown:
                shown = used + 0.1
                hit_rate = f", HR@10 {evaluate(trainer.model, log, ks=(10,), users=sample)['HR@10']:.3f} of {len(sample)} users"
            trainer.seconds = time.perf_counter() - began
            losses = "".join(f", loss of {task} {mean:.3f}" for task, mean in trainer.losses.items())
            bar.set_postfix_str(f"{trainer.seconds:.0f} s, step {trainer.steps:,}{losses}{hit_rate}", refresh=False)
            if trainer.seconds - saved > SAVE_EVERY:
                trainer.save(out)
                saved = trainer.seconds


def _account(result: TrainingResult, trainer: Trainer) -> dict:
    """What training.json says."""
    return {
        "command": shlex.join(["python", *sys.orig_argv[1:]]),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": environment.versions(),
        "device": environment.device_name(),
        "threads": torch.get_num_threads(),
        **trainer.identity,
        **{field: value for field, value in result.to_dict().items() if field != "folder"},
    }


@contextlib.contextmanager
def _ctrl_c() -> Iterator[threading.Event]:
    """An event that the first Ctrl-C sets; the second one interrupts as usual. Outside the main thread, Ctrl-C is not ours."""
    pressed = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield pressed
        return

    def note(*_) -> None:
        pressed.set()
        signal.signal(signal.SIGINT, usual)

    usual = signal.signal(signal.SIGINT, note)
    try:
        yield pressed
    finally:
        signal.signal(signal.SIGINT, usual)
