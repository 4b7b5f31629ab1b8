"""Changes the attention of a trained language model for another layer's, and trains the model on: from softmax to linear.

subquad train --layer softmax --text my/notes/*.txt --text-length 256
subquad convert runs/train/runs/softmax-seed0-... --layer hedgehog --text my/notes/*.txt
subquad generate runs/convert/runs/hedgehog-seed0-... --prompt "Once upon"

The projections stay. First what is new learns, layer by layer, to do what the attention did ("distilled"): the weights, of
softmax to hedgehog, else the outputs. Then all parameters learn the text ("fine-tuned"). A table says what was lost and won.

As LoLCATs (arXiv 2410.10254): projections kept, attention transfer of the new parameters alone on the teacher's inputs, then
the loss of the next token. Not as there: fine-tuning is of all parameters, not of low-rank updates of the projections;
weights are compared where there are some (as Hedgehog, 2402.04347), not outputs; errors of outputs are relative to the
outputs; no window of softmax stays beside the linear part; small models on bytes.
As Mamba in the Llama (arXiv 2408.15237): query, key and value maps begin the new layer. Not as there: all layers are
changed, not a half of them; networks are not frozen; no distillation of the logits, no supervised or preference tuning, no
speculative decoding.
"""

import argparse
import dataclasses
import itertools
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

import jax
from flax import nnx

from subquad import zoo
from subquad.lra import checkpoints, distil, models, plan, protocols, sizes, tasks, train, trained
from subquad.lra.bench import measure
from subquad.lra.cli import commands
from subquad.lra.data import pipeline, store
from subquad.lra.evaluation import Evaluation
from subquad.lra.files import RunError, refuse
from subquad.lra.objectives import OBJECTIVES
from subquad.lra.report import measurements, results, text_tables
from subquad.lra.run import Run
from subquad.zoo import conversion, registry

CONTEXTS = (256, 2048, 16384)
# Values of a run that fine-tuning has of its own; what it is not given, the recipe gives.
TRAINING = (
    "steps", "batch_size", "accumulate", "learning_rate", "schedule", "warmup_steps", "weight_decay", "clip_norm",
    "dropout_rate", "evaluate_every", "early_stopping", "ema", "seed",
)  # fmt: skip
STEPS, RATE_PART = 200, 0.25
# Of what the run before had, what its layer, its schedule or its steps decided.
NOT_KEPT = (
    "recipe", "task", "config", "layer", "layer_options", "learning_rate", "steps", "warmup_steps", "evaluate_every", "b1",
    "patience", "early_stopping", "state_learning_rate", "step_learning_rate", "attention_dropout_rate",
    *protocols.MEANINGLESS["language_model"],
)  # fmt: skip
# Of what a layer tells of itself, what is an option of a run's layer.
INHERITED = ("num_heads", "num_kv_heads", "qkv_features", "rotary_base", "use_bias")
FILE = "conversion.json"


def parse(command_line: Sequence[str] | None, program: str):
    parser = commands.Parser(prog=program, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="folder of a run, in runs/ of what train was given as --out")
    parser.add_argument("--layer", default="hedgehog", help="in zoo.LAYERS, that is causal, as gla; default: hedgehog")
    parser.add_argument("--layer-options", nargs="+", default=[], metavar="NAME=VALUE", help="of its constructor")
    parser.add_argument("--text", nargs="+", metavar="FILE", help="the files that the model was trained on, or others")
    parser.add_argument("--data-dir", default=None, help="folder of data sets; default: TFDS's own")
    parser.add_argument("--out", default="runs/convert", help="folder of the new run; default: runs/convert")
    parser.add_argument("--resume", action="store_true", help="go on with fine-tuning that was stopped")
    add, count = parser.add_argument, commands.number(int, 0)
    add("--distil-steps", type=count, default=STEPS, metavar="N", help=f"of distillation; default: {STEPS}")
    rate = commands.number(float, 0, above=True)
    add("--distil-learning-rate", type=rate, default=1e-2, metavar="RATE", help="of distillation, at first; default: 0.01")
    commands.add_options(
        parser, Run, leave_out=tuple(one.name for one in dataclasses.fields(Run) if one.name not in TRAINING),
        steps=f"of fine-tuning; default: {STEPS}",
        learning_rate=f"of fine-tuning, at its peak; default: {RATE_PART} of that of the run before",
        seed="of the new parameters and the order of the text; default: that of the run before",
    )  # fmt: skip
    return parser.parse_args(command_line)


def main(command_line: Sequence[str] | None = None, program: str = "convert") -> int:
    """Does what the words of a command line say; None: of this process."""
    arguments = parse(command_line, program)
    teacher, before, task = trained.load(arguments.run)
    check(teacher, before, task)
    registry.find(arguments.layer)  # an unknown name is told before text is asked for
    task, own = text_of(arguments, task)
    run = run_of(arguments, teacher, before, task)
    converted = zoo.convert(teacher, run.layer, rngs=nnx.Rngs(run.seed), **run.layer_options)
    sizes.check(run, task, own)
    models.split_as(run, task, converted.model)  # what a run of this layer would not build is refused at once
    folder = checkpoints.open_folder(arguments.out) / "runs" / run.id
    settings = dict(
        model=str(pathlib.Path(arguments.run).resolve()), distil_steps=arguments.distil_steps,
        distil_learning_rate=arguments.distil_learning_rate,
    )  # fmt: skip
    if arguments.resume and (said := checkpoints.nothing_to_resume(folder.parent, {run.id: dataclasses.asdict(run)})):
        print(said, file=sys.stderr)
    record = begun(checkpoints.open_folder(folder), run, settings, arguments.resume)
    print(converted.changes[0], file=sys.stderr)
    if record is None:
        splits = own or store.load(task.dataset, arguments.data_dir)[0]
        scores = {"trained": scorer(before, task, splits, teacher)(teacher)}
        score = scorer(run, task, splits, converted.model)
        scores["converted"] = score(converted.model)
        losses = distilled(arguments, run, task, splits, teacher, converted)
        scores["distilled"] = score(converted.model) if losses else scores["converted"]
        record = dict(settings, bits_per_byte=scores, distil_losses=losses)
        checkpoints.write_json(folder / FILE, record)
    given = dict(task=task, splits=own) if own else dict(data_dir=arguments.data_dir)
    result = train.train(run, out=folder, model=converted.model, resume=arguments.resume, **given)
    show(record, result, run.steps, (before.layer, teacher), (run.layer, converted.model))
    print(f"Go on: subquad generate {folder}")
    return 0 if result.status == "ok" else commands.FAILED


def check(model: nnx.Module, run: Run, task: tasks.Task) -> None:
    """Refuses a model that is no language model, or has no attention to be changed."""
    if task.kind != "language_model":
        refuse("run", "be of a language model", f"one on {task.name}", "Train one with --task pylib_lm or --text.")
    if not all(conversion.is_attention(block.mixer) for block in model.model.encoder.blocks):
        refuse("run", "have attention layers of the zoo, such as softmax", repr(run.layer), "Train one with --layer softmax.")


def text_of(arguments, task: tasks.Task) -> tuple[tasks.Task, dict | None]:
    """The task to train on, and its splits where it is on files."""
    if arguments.text is None:
        if task.name == tasks.OWN_TEXT:
            refuse("text", "be given for a run on text of yours", "none", "Pass --text with the files that it was trained on.")
        return task, None
    found, splits = tasks.own_text(arguments.text, task.length)
    if found.config != task.config:
        print("The text is another than the model's, which may have seen what is tested here.", file=sys.stderr)
    return found, splits


def run_of(arguments, model: nnx.Module, before: Run, task: tasks.Task) -> Run:
    """The run of the new layer: sizes as before, and how to fine-tune."""
    name, old = arguments.layer, model.model.encoder.blocks[0].mixer
    supports = registry.find(name).supports
    known, has = registry.options(name), conversion.inherited_options(old)
    options = {word: has[word] for word in INHERITED if word in known and has[word] is not None}
    if not supports.grouped or old.num_kv_heads == old.num_heads:
        options.pop("num_kv_heads", None)
    kept = {field.name: getattr(before, field.name) for field in dataclasses.fields(Run) if field.name not in NOT_KEPT}
    if "dropout_rate" in known:
        kept["attention_dropout_rate"] = before.attention_dropout_rate
    usual = dict(steps=STEPS, learning_rate=RATE_PART * before.learning_rate)
    given = {word: value for word, value in commands.given_fields(Run, arguments).items() if word in TRAINING}
    options |= commands.assignments(arguments.layer_options)
    return plan.plan(before.recipe, name, task=task, layer_options=options, **{**kept, **usual, **given})


def begun(folder: pathlib.Path, run: Run, settings: dict[str, Any], resume: bool) -> dict | None:
    """What an earlier conversion in a folder found before it fine-tuned; None: there is nothing to go on with.

    Raises: RunError: the folder holds a run and not `resume`, or a run of another conversion.
    """
    checkpoints.begin_or_resume(folder, dataclasses.asdict(run), resume, results.Result)
    if not checkpoints.saved_steps(folder):
        return None
    if not (folder / FILE).exists():
        raise RunError(f"out: folder {folder} must hold a conversion, got a run of train. Choose another with --out.")
    cure = "Delete the folder and convert anew."
    record = checkpoints.read_record(folder / FILE, cure)
    for name in (*settings, "bits_per_byte", "distil_losses"):
        if name not in record:
            raise RunError(f"out: file {folder / FILE} must be a whole one that was written here, got no {name}. {cure}")
    for name, value in settings.items():
        if record[name] != value:
            raise RunError(
                f"out: folder {folder} must hold this conversion or none, got one with {name}={record[name]!r} instead of "
                f"{value!r}. Choose another with --out."
            )
    return record


def scorer(run: Run, task: tasks.Task, splits, like: nnx.Module):
    """A function: model, of the variables of `like` -> bits per byte on test."""
    learned = nnx.Any(nnx.Param, nnx.BatchStat)
    graph, _, fixed = nnx.split(like, learned, ...)
    evaluation = Evaluation(run, task, OBJECTIVES[task.kind], splits, quiet=False)
    evaluation.build(graph, fixed, None)
    return lambda model: evaluation.score_split(nnx.state(model, learned), "test").score


def distilled(arguments, run: Run, task: tasks.Task, splits, teacher, converted: conversion.Converted) -> list[float]:
    """Distils the converted model, in place. Returns: the losses."""
    if not arguments.distil_steps:
        return []
    batches = pipeline.training_batches(splits["train"], batch_size=run.batch_size, length=task.length, seed=run.seed)
    losses = distil.distil(
        teacher, converted, batches, steps=arguments.distil_steps, learning_rate=arguments.distil_learning_rate
    )
    if not losses:
        print(f"There is nothing to distil: {run.layer} has no parameters that the run before had not.", file=sys.stderr)
    return losses


def cache_bytes(model: nnx.Module, context: int) -> int | None:
    """Bytes of the caches of all layers for one sequence, whatever the model's positions; None: the layer has none so long."""
    try:
        return measure.made_bytes(lambda: [block.mixer.init_cache(1, context) for block in model.model.encoder.layers])
    except (ValueError, NotImplementedError):
        return None


def show(
    record: dict, result: results.Result, steps: int, before: tuple[str, nnx.Module], after: tuple[str, nnx.Module]
) -> None:
    """Prints the table of what was lost and what was won."""
    headings = [f"cache at {measurements.length_label(context)}" for context in CONTEXTS]
    scores = {**record["bits_per_byte"], "fine-tuned": result.bits_per_byte}
    rows = [["", "layer", "bits per byte", "parameters", *headings]]
    for (stage, score), (layer, model) in zip(scores.items(), [before, *itertools.repeat(after, 3)], strict=True):
        count = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))
        caches = [cache_bytes(model, context) for context in CONTEXTS]
        numbers = ["none" if number is None else f"{number:,}" for number in (count, *caches)]
        rows.append([stage, layer, "failed" if score is None else f"{score:.3f}", *numbers])
    text_tables.Table("Bits per byte on test, and bytes of the cache of one sequence", rows).show()
    if record["distil_losses"]:
        losses = record["distil_losses"]
        print(f"Distillation: loss {losses[0]:.3f} at its first step, {losses[-1]:.3f} at its last, the {len(losses)}th.")
    longest = [cache_bytes(model, CONTEXTS[-1]) for _, model in (before, after)]
    if result.bits_per_byte is not None and all(longest):
        lost, factor = result.bits_per_byte - record["bits_per_byte"]["trained"], longest[0] / longest[1]
        words = f"{abs(lost):.3f} bits per byte {'more' if lost > 0 else 'less'} after {steps} steps more"
        print(f"At the end {words}; at {CONTEXTS[-1]:,} bytes of context a cache {factor:,.1f} times as small.")
