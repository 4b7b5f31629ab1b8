"""Goes on from a text with a language model that scripts/train.py trained, byte by byte as it comes.

python scripts/train.py --layer softmax --text my/notes/*.txt --text-length 256
python scripts/generate.py runs/train/runs/softmax-seed0-... --prompt "Once upon" --temperature 0.8
"""

import argparse
import itertools
import os
import sys
import time
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from flax import nnx

from subquad.lra import trained
from subquad.lra.cli import commands
from subquad.lra.data import encodings


def parse(command_line: Sequence[str] | None, program: str):
    parser = commands.Parser(prog=program, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="folder of a run, in runs/ of what train was given as --out")
    parser.add_argument("--prompt", default="\n", help="the text to go on from; default: a new line")
    parser.add_argument("--tokens", type=int, help="bytes to add; default: 256, or as many as the model takes")
    parser.add_argument("--temperature", type=float, default=1.0, help="0: the most likely byte each time; default: 1")
    parser.add_argument("--top-k", type=int, help="sample among so many most likely bytes only")
    parser.add_argument("--top-p", type=float, help="sample among the most likely bytes that together have this probability")
    parser.add_argument("--seed", type=int, default=0, help="of the samples; default: 0")
    return parser.parse_args(command_line)


def main(command_line: Sequence[str] | None = None, program: str = "generate") -> int:
    """Does what the words of a command line say; None: of this process."""
    arguments = parse(command_line, program)
    model, run, task = trained.load(arguments.run)
    if task.kind != "language_model":
        raise ValueError(f"run must be of a language model, got one on {task.name}. Train one with --task pylib_lm or --text.")
    prompt = os.fsencode(arguments.prompt)  # what was typed, whether UTF-8 or not
    if not prompt:
        raise ValueError("prompt must have at least one byte, got ''. Leave it out for a new line.")
    ids = jnp.asarray(encodings.shifted(np.frombuffer(prompt, np.uint8))[None].astype(np.int32))
    count, longest = arguments.tokens, model.model.longest
    if count is None:
        count = 256 if longest is None else max(1, min(256, longest - ids.shape[1] + 1))
    tokens = model.model.stream(
        ids, count, temperature=arguments.temperature, top_k=arguments.top_k, top_p=arguments.top_p,
        stop_token=task.end_of_document, rngs=nnx.Rngs(arguments.seed),
    )  # fmt: skip
    began, count = time.perf_counter(), 0
    first = next(tokens)  # whose compilation still refuses words
    write(prompt)
    for token in itertools.chain([first], tokens):
        byte = int(token[0]) - 1
        if byte + 1 == task.end_of_document:
            break
        write(bytes([byte]) if byte >= 0 else b"")  # 0 is padding, which no text holds
        count += 1
    write(b"\n")
    rate = count / (time.perf_counter() - began)
    print(f"{count} bytes of {run.layer}, {rate:.2g} a second with what was compiled.", file=sys.stderr)
    return 0


def write(text: bytes) -> None:
    """Writes at once what may be a part of a character."""
    sys.stdout.buffer.write(text)
    sys.stdout.buffer.flush()
