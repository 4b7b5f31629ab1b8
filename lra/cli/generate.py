"""Goes on from a text with a language model that subquad train trained, byte by byte as it comes.

subquad train --layer softmax --text my/notes/*.txt --text-length 256
subquad generate runs/train/runs/softmax-seed0-... --prompt "Once upon" --temperature 0.8
subquad generate runs/train/runs/softmax-seed0-... --draft runs/small/runs/softmax-seed0-... --draft-tokens 6
"""

import argparse
import math
import os
import sys
import time
from collections.abc import Generator, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from subquad import zoo
from subquad.lra import models, tasks, trained
from subquad.lra.cli import commands
from subquad.lra.data import encodings
from subquad.lra.run import Run


def parse(command_line: Sequence[str] | None, program: str):
    parser = commands.Parser(prog=program, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="folder of a run, in runs/ of what train was given as --out")
    parser.add_argument("--prompt", default="\n", help="the text to go on from; default: a new line")
    parser.add_argument("--tokens", type=int, help="bytes to add; default: 256, or as many as the model takes")
    parser.add_argument("--temperature", type=float, default=1.0, help="0: the most likely byte each time; default: 1")
    parser.add_argument("--top-k", type=int, help="sample among so many most likely bytes only")
    parser.add_argument("--top-p", type=float, help="sample among the most likely bytes that together have this probability")
    parser.add_argument("--draft", metavar="RUN", help="run of a smaller model, which proposes bytes; same text, sooner")
    parser.add_argument("--draft-tokens", type=int, metavar="K", help="bytes it proposes at a time; default: 4")
    parser.add_argument("--seed", type=commands.number(int, 0, below=2**32), default=0, help="of the samples; default: 0")
    return parser.parse_args(command_line)


def main(command_line: Sequence[str] | None = None, program: str = "generate") -> int:
    """Does what the words of a command line say; None: of this process."""
    arguments = parse(command_line, program)
    model, run, task = language_model(arguments.run, "run")
    draft = None if arguments.draft is None else language_model(arguments.draft, "draft")[0]
    prompt = os.fsencode(arguments.prompt)  # what was typed, whether UTF-8 or not
    if not prompt:
        raise ValueError("prompt must have at least one byte, got ''. Leave it out for a new line.")
    ids = jnp.asarray(encodings.shifted(np.frombuffer(prompt, np.uint8))[None].astype(np.int32))
    longest = min((one.longest for one in (model, draft) if one is not None and one.longest is not None), default=math.inf)
    if len(prompt) > longest:
        cure = "Shorten it, or train with --positions none."
        raise ValueError(f"prompt must have at most {longest} bytes, those that the model takes, got {len(prompt)}. {cure}")
    count = min(256, longest - len(prompt) + 1) if arguments.tokens is None else arguments.tokens
    tokens = model.stream(
        ids, count, temperature=arguments.temperature, top_k=arguments.top_k, top_p=arguments.top_p,
        stop_token=task.end_of_document, draft=draft, draft_tokens=arguments.draft_tokens, rngs=nnx.Rngs(arguments.seed),
    )  # fmt: skip
    began = time.perf_counter()
    count, share = follow(tokens, prompt, task.end_of_document)
    rate = count / (time.perf_counter() - began)
    stood = "" if share is None else f" {share:.0%} of the bytes of the draft stood."
    print(f"{count} bytes of {run.layer}, {rate:.2g} a second with what was compiled.{stood}", file=sys.stderr)
    return 0


def language_model(folder: str, name: str) -> tuple[zoo.CausalLM, Run, tasks.Task]:
    """The language model of a run's folder, the run and its task."""
    model, run, task = trained.load(folder, name=name)
    if not isinstance(model, models.LanguageModel):
        raise ValueError(
            f"{name} must be of a language model, got one on {task.name}. Train one with --task pylib_lm or --text."
        )
    return model.model, run, task


def follow(
    tokens: Generator[Any, None, float | None], prompt: bytes, end_of_document: int | None
) -> tuple[int, float | None]:
    """Writes the prompt, and the bytes of a stream of one sample as they come -> (how many, what the stream returns)."""
    count, text = 0, prompt  # which waits for the first token, whose compilation still refuses words
    while True:
        try:
            token = int(next(tokens)[0])
        except StopIteration as end:
            write(b"\n")
            return count, end.value
        if token != end_of_document:
            text += bytes([token - 1]) if token > 0 else b""  # 0 is padding, which no text holds
            count += 1
        write(text)
        text = b""


def write(text: bytes) -> None:
    """Writes at once what may be a part of a character."""
    sys.stdout.buffer.write(text)
    sys.stdout.buffer.flush()
