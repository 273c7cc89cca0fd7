"""Training that can be killed at any point and, run again, ends with the very same parameters.

Each epoch ends with a checkpoint, and what an epoch does depends on nothing but the checkpoint
before it and the number of the epoch: the order of the examples and all noise are drawn by folding
that number into a key. So a training that goes on from a checkpoint cannot differ from one that was
never killed.
"""

import dataclasses
import functools
import hashlib
import json
import math
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, Num, PRNGKeyArray, PyTree
from tqdm import tqdm

from experiments.checkpoints import Checkpoints
from experiments.data import Dataset
from experiments.models import Model, ModelConfig, build_model

# How many steps run on the device between two updates of the progress bar.
_CHUNK_STEPS = 20
# The margin that a crop is moved in, in pixels.
_MARGIN = 4


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """How to train: SGD with momentum, or AdamW, on the cross-entropy.

    Attributes:
        epochs: The number of passes over the training split, each in its own random order.
        batch_size: The number of examples per step; those that do not fill a last batch are left
            out of an epoch.
        learning_rate: The step size; with the one-cycle schedule, its peak.
        momentum: The decay of the gradient's running sum (AdamW: mean), in [0, 1).
        weight_decay: The multiple of each parameter added to its gradient (AdamW: to its step).
        one_cycle: Whether the step size rises from a 25th for 30 % of the steps, and then falls to
            almost nothing, each along a cosine (Smith and Topin 2019, as in PyTorch).
        drops: Pairs of an epoch and a factor that the step size is multiplied by from then on.
        augment: Whether images are cropped at random out of a black margin of 4 pixels, and
            flipped.
        dtype: The dtype of the activations, float32 or bfloat16.
        adam: Whether steps are those of AdamW (Loshchilov and Hutter 2019), not SGD.
    """

    epochs: int
    batch_size: int
    learning_rate: float
    momentum: float
    weight_decay: float = 0.0
    one_cycle: bool = False
    drops: tuple[tuple[int, float], ...] = ()
    augment: bool = False
    dtype: str = "float32"
    adam: bool = False


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("variables",),
    meta_fields=("config", "temperature", "share"),
)
@dataclasses.dataclass(frozen=True)
class Teacher:
    """A model whose answers another one learns (Hinton, Vinyals and Dean 2015).

    The loss is `share * temperature² * KL + (1 - share) * cross-entropy`. KL is the divergence of
    the student's softmax from the teacher's, both of logits divided by the temperature; its
    gradients shrink with the square of that.

    Attributes:
        config: Which model the teacher is.
        variables: The teacher's variables; it is run in inference mode.
        temperature: The temperature that softens the answers of both.
        share: The share of the loss that is the teacher's, in [0, 1].
    """

    config: ModelConfig
    variables: PyTree
    temperature: float = 4.0
    share: float = 0.9

    def loss(
        self, logits: Float[Array, "*batch classes"], answers: Float[Array, "*batch classes"]
    ) -> Float[Array, " *batch"]:
        """Returns the divergence from the teacher, times the square of the temperature.

        Args:
            logits: The logits of the student.
            answers: The logits of the teacher.

        Returns:
            A loss for each example.
        """
        student = jax.nn.log_softmax(logits / self.temperature)
        teacher = jax.nn.log_softmax(answers / self.temperature)
        terms = jnp.exp(teacher) * (teacher - student)
        divergence = jnp.sum(terms, axis=-1)
        return self.temperature**2 * divergence


class TrainState(NamedTuple):
    """All that one epoch hands to the next, and so all that a checkpoint holds.

    Attributes:
        variables: The variables of the model.
        opt_state: The state of the optimiser.
        history: The mean loss and accuracy of each epoch that is done; 0 for the others.
    """

    variables: PyTree
    opt_state: PyTree
    history: Float[Array, "epochs 2"]


@dataclasses.dataclass(frozen=True)
class Trained:
    """A trained model.

    Attributes:
        params: The variables of the Flax module: parameters, and statistics if it has batch norm.
        history: The mean training loss and accuracy in percent of each epoch, `[epochs, 2]`.
        seconds: The time spent training in this call.
        epochs_reused: The number of epochs that came from checkpoints of earlier calls.
    """

    params: PyTree
    history: np.ndarray
    seconds: float
    epochs_reused: int


def fingerprint(*parts: Any) -> str:
    """Returns a short digest of dataclasses and JSON values, the same in every process."""
    text = json.dumps(parts, sort_keys=True, default=dataclasses.asdict)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def train(
    model_config: ModelConfig,
    config: TrainConfig,
    dataset: Dataset,
    seed: int,
    folder: Path,
    start: PyTree | None = None,
    teacher: Teacher | None = None,
) -> Trained:
    """Trains a model, or resumes or reuses an earlier training of the same configuration.

    The result depends on the arguments other than `folder` alone, however often the training was
    interrupted. Checkpoints lie in a subfolder named after everything that the result depends
    on, so that a changed configuration never meets the checkpoints of another.

    Args:
        model_config: Which model to train.
        config: How to train it.
        dataset: What to train it on; only the training split is used.
        seed: The source of the initialisation and of the order of the examples.
        folder: The folder where the checkpoints of all trainings of one run are kept.
        start: Variables to go on from, as in fine-tuning; None draws them by the seed.
        teacher: The model whose answers to learn beside the labels; None for the labels alone.

    Returns:
        The trained model.

    Raises:
        ValueError: The batch is larger than the training split, there are no epochs, or the teacher
            has a temperature or share that makes no sense.
    """
    count = len(dataset.train_labels)
    _check(config, count, teacher)
    _, order_key = jax.random.split(jax.random.key(seed))
    # The orders of examples fold in the epochs, all of them smaller numbers: no key is used twice.
    noise_key = jax.random.fold_in(order_key, config.epochs)

    variables = initial(model_config, dataset, seed) if start is None else start
    optimizer = _optimizer(config, steps=count // config.batch_size)
    opt_state = jax.jit(optimizer.init)(variables["params"])
    state = TrainState(variables, opt_state, jnp.zeros((config.epochs, 2)))

    origin = None if start is None else _digest(start)
    parts = [model_config, config, seed, dataset.name, dataset.fingerprint(), origin]
    if teacher:
        answers = _digest(teacher.variables)
        parts.append([teacher.config, answers, teacher.temperature, teacher.share])
    label = f"{model_config.label}-seed-{seed}"
    title = f"{dataset.name} {label}"
    digest = fingerprint(*parts)
    checkpoints = Checkpoints(folder / f"{label}-{digest}")
    done, restored = checkpoints.newest(state)
    # Orbax commits arrays to a device, for which JAX would compile everything once more.
    state = jax.tree.map(_uncommitted, restored)

    began = time.perf_counter()
    if done == config.epochs:
        # Results go to the standard output, and news of the work here.
        print(f"{title}: reusing the training finished earlier", file=sys.stderr)
    else:
        task = _Task(
            build_model(model_config, dataset.classes, config.dtype),
            config,
            jnp.asarray(dataset.train_images),
            jnp.asarray(dataset.train_labels),
            teacher,
        )
        with _Progress(title, config, count, done) as progress:
            for epoch in range(done, config.epochs):
                order = _epoch_order(order_key, epoch, count, config.batch_size)
                noise = jax.random.fold_in(noise_key, epoch)
                state = _run_epoch(task, state, epoch, order, noise, progress)
                checkpoints.save(epoch + 1, state)
    seconds = time.perf_counter() - began
    return Trained(state.variables, np.asarray(state.history), seconds, epochs_reused=done)


def initial(model_config: ModelConfig, dataset: Dataset, seed: int) -> PyTree:
    """Draws the variables that `train` starts from.

    Args:
        model_config: Which model to draw.
        dataset: The data that the model is for.
        seed: The seed, as given to `train`.

    Returns:
        The variables of the Flax module.
    """
    init_key, _ = jax.random.split(jax.random.key(seed))
    model = build_model(model_config, dataset.classes)
    return _draw(model, init_key, dataset.train_images[:1])


def _check(config: TrainConfig, count: int, teacher: Teacher | None) -> None:
    """Refuses what can't be trained."""
    if config.batch_size > count or config.epochs < 1:
        raise ValueError(
            f"Nothing to train with {config.epochs} epochs of batches of {config.batch_size} from"
            f" {count} examples; give at least one epoch and a batch that the examples fill."
        )
    if teacher and not (teacher.temperature > 0 and 0 <= teacher.share <= 1):
        raise ValueError(
            f"A teacher with temperature {teacher.temperature} and share {teacher.share}; give a"
            " temperature above 0 and a share of 0 to 1."
        )


def _uncommitted(leaf: Array) -> Array:
    """Puts an array on the default device without committing it there."""
    on_host = np.asarray(leaf)
    return jax.device_put(on_host)


def _digest(tree: PyTree) -> str:
    """Returns a hexadecimal digest of the values of a tree."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        array = np.asarray(leaf)
        name = jax.tree_util.keystr(path)
        digest.update(f"{name} {array.shape} {array.dtype}".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def _optimizer(config: TrainConfig, steps: int) -> optax.GradientTransformation:
    """Builds the optimiser for epochs of some number of steps."""
    # optax counts steps, and recipes epochs.
    if config.one_cycle:
        schedule = optax.cosine_onecycle_schedule(config.epochs * steps, config.learning_rate)
    else:
        drops = {epoch * steps: factor for epoch, factor in config.drops}
        schedule = optax.piecewise_constant_schedule(config.learning_rate, drops)
    if config.adam:
        return optax.adamw(schedule, config.momentum, weight_decay=config.weight_decay)
    # The decay is added to the gradient, before momentum, as in PyTorch.
    decay = optax.add_decayed_weights(config.weight_decay)
    return optax.chain(decay, optax.sgd(schedule, config.momentum))


@functools.partial(jax.jit, static_argnames="model")
def _draw(model: Model, key: PRNGKeyArray, images: Num[Array, "1 ..."]) -> PyTree:
    return model.init(key, images)


@functools.partial(jax.jit, static_argnames=("count", "batch_size"))
def _epoch_order(
    key: PRNGKeyArray, epoch: int, count: int, batch_size: int
) -> Int[Array, "steps batch"]:
    """Draws the examples of each step of an epoch, whether or not earlier epochs ran here."""
    order = jax.random.permutation(jax.random.fold_in(key, epoch), count)
    steps = count // batch_size
    return order[: steps * batch_size].reshape(steps, batch_size)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("images", "labels", "teacher"),
    meta_fields=("model", "config"),
)
@dataclasses.dataclass(frozen=True)
class _Task:
    """What is the same in all steps of a training.

    Attributes:
        model: The model that learns.
        config: How it is trained.
        images: All images of the training split.
        labels: Their labels.
        teacher: The model whose answers are learned too, if any.
    """

    model: Model
    config: TrainConfig
    images: Num[Array, "n ..."]
    labels: Int[Array, "n ..."]
    teacher: Teacher | None

    def objective(
        self, params: PyTree, rest: PyTree, chosen: Int[Array, " batch"], noise: PRNGKeyArray
    ) -> tuple[Array, tuple[PyTree, Array]]:
        """Computes the loss of one batch, and beside it the new statistics and how many are right.

        Args:
            params: The parameters, by which the loss is differentiated.
            rest: The other variables, such as running statistics.
            chosen: The indices of the examples of the batch.
            noise: The source of the crops and flips.
        """
        batch = self.images[chosen]
        labels = self.labels[chosen]
        if self.config.augment:
            black = jnp.min(self.images, axis=(0, 1, 2), keepdims=True)
            batch = augmented(noise, batch, black)
        variables = {**rest, "params": params}
        logits, changed = self.model.apply(variables, batch, train=True, mutable=list(rest))
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
        if self.teacher:
            share = self.teacher.share
            classes = logits.shape[-1]
            master = build_model(self.teacher.config, classes, self.config.dtype)
            answers = master.apply(self.teacher.variables, batch)
            divergence = self.teacher.loss(logits, answers).mean()
            loss = share * divergence + (1 - share) * loss
        is_correct = jnp.argmax(logits, axis=-1) == labels
        correct = jnp.sum(is_correct, dtype=jnp.float32)
        return loss, (changed, correct)


def _run_epoch(
    task: _Task,
    state: TrainState,
    epoch: int,
    order: Int[Array, "steps batch"],
    noise: PRNGKeyArray,
    progress: "_Progress",
) -> TrainState:
    """Runs one epoch in chunks of steps and notes its mean loss and accuracy in the history."""
    steps, batch_size = order.shape
    judged = batch_size * math.prod(task.labels.shape[1:])  # every token of a window of a text
    variables, opt_state, history = state
    # A chunk gives its buffers away, and the first ones may be the caller's.
    carry = (_copied(variables), opt_state, jnp.zeros(2))
    for low in range(0, steps, _CHUNK_STEPS):
        high = min(low + _CHUNK_STEPS, steps)
        carry = _run_steps(task, carry, order, low, high, noise)
        loss, correct = carry[2].tolist()
        accuracy = 100 * correct / (high * judged)
        progress.advance(high - low, loss / high, accuracy)
    variables, opt_state, sums = carry
    # The second becomes a percentage.
    counts = jnp.asarray([steps, steps * judged / 100], dtype=sums.dtype)
    means = sums / counts
    return TrainState(variables, opt_state, history.at[epoch].set(means))


@jax.jit
def _copied(tree: PyTree) -> PyTree:
    return jax.tree.map(jnp.copy, tree)


# Variables, the optimiser's state, and the sums of the loss and of the number of correct ones.
_Carry = tuple[PyTree, PyTree, Float[Array, " 2"]]


@functools.partial(jax.jit, donate_argnames="carry")
def _run_steps(
    task: _Task,
    carry: _Carry,
    order: Int[Array, "steps batch"],
    low: int,
    high: int,
    noise: PRNGKeyArray,
) -> _Carry:
    """Runs the steps `low` to `high` of an epoch; adds up the loss and the number of correct ones.

    The bounds are traced, so that a last, shorter chunk needs no compilation of its own.
    """
    steps = len(order)
    optimizer = _optimizer(task.config, steps)
    graded = jax.value_and_grad(task.objective, has_aux=True)

    def one_step(step: Int[Array, ""], carry: _Carry) -> _Carry:
        variables, opt_state, sums = carry
        # Only parameters are learned; running statistics come out of the forward pass.
        params = variables["params"]
        rest = {name: tree for name, tree in variables.items() if name != "params"}
        key = jax.random.fold_in(noise, step)
        (loss, (changed, correct)), grads = graded(params, rest, order[step], key)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        variables = {**changed, "params": optax.apply_updates(params, updates)}
        return variables, opt_state, sums + jnp.stack([loss, correct])

    return jax.lax.fori_loop(low, high, one_step, carry)


def augmented(
    key: PRNGKeyArray,
    images: Float[Array, "batch height width channels"],
    black: Float[Array, "1 1 1 channels"],
) -> Float[Array, "batch height width channels"]:
    """Crops each image out of a black margin, somewhere, and flips every other one.

    Args:
        key: The source of both the crops and the flips.
        images: The images.
        black: The value of each channel in the margin.

    Returns:
        As many images, of the same size.
    """
    count, height, width, channels = images.shape
    corner_key, flip_key = jax.random.split(key)
    places = 2 * _MARGIN + 1
    corners = jax.random.randint(corner_key, (count, 2), 0, places)
    is_flipped = jax.random.bernoulli(flip_key, shape=(count, 1, 1, 1))
    margin = (_MARGIN, _MARGIN)
    # Padding puts zeros there, and zero is black only once black has been subtracted.
    none = (0, 0)
    padded = jnp.pad(images - black, (none, margin, margin, none)) + black

    def crop(image: Array, corner: Int[Array, " 2"]) -> Array:
        return jax.lax.dynamic_slice(image, (*corner, 0), (height, width, channels))

    cropped = jax.vmap(crop)(padded, corners)
    return jnp.where(is_flipped, cropped[:, :, ::-1], cropped)


class _Progress:
    """A progress bar where a person watches, one line before and one after where nobody does."""

    def __init__(self, title: str, config: TrainConfig, examples: int, epochs_done: int):
        """Starts the bar at the epochs that are done already."""
        self._title = title
        self._epochs = config.epochs
        steps = examples // config.batch_size
        self._bar = tqdm(
            total=config.epochs * steps,
            initial=epochs_done * steps,
            desc=title,
            unit="step",
            disable=not sys.stderr.isatty(),
        )
        self._last = ""
        if self._bar.disable:
            progress = f"{epochs_done}/{self._epochs} epochs done"
            print(f"{title}: training, {progress}", file=sys.stderr)

    def advance(self, steps: int, loss: float, accuracy: float) -> None:
        """Moves on by some steps; loss and accuracy in percent are means over the epoch so far."""
        self._last = f"loss {loss:.4f}, accuracy {accuracy:.2f} %"
        self._bar.set_postfix_str(self._last, refresh=False)
        self._bar.update(steps)

    def __enter__(self) -> "_Progress":
        return self

    def __exit__(self, kind: Any, error: Any, traceback: Any) -> None:
        """Closes the bar, also when training is interrupted."""
        self._bar.close()
        if self._bar.disable and error is None:
            work = f"trained {self._epochs} epochs"
            print(f"{self._title}: {work}, {self._last}", file=sys.stderr)
