"""Trains one layer on one task under a recipe. Every value of the run is an option; the recipe gives the rest.

python scripts/train.py --layer performer --config lra --steps 5000 --layer-options num_features=128
"""

import dataclasses
import json
import sys

from subquad.lra import checkpoints, commands, recipes, results, train


def parse():
    parser = commands.Parser(prog="train", description=__doc__)
    named = f"one of {', '.join(recipes.RECIPES)}; default: quickstart"
    parser.add_argument("--recipe", default="quickstart", help=named)
    parser.add_argument("--layer", default="softmax", help="a name in zoo.LAYERS; default: softmax")
    parser.add_argument("--layer-options", nargs="+", default=[], metavar="NAME=VALUE", help="of its constructor")
    parser.add_argument("--out", default="runs/train", help="folder of results and checkpoints; default: runs/train")
    parser.add_argument("--data-dir", default=None, help="folder of data sets; default: TFDS's own")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out")
    commands.add_options(parser, recipes.Run, leave_out=("recipe", "layer", "layer_options"))
    return parser.parse_args()


def main() -> int:
    arguments = parse()
    words = commands.changes(recipes.Run, arguments)
    words["layer_options"] = commands.assignments(arguments.layer_options)
    run = recipes.plan(words.pop("recipe"), words.pop("layer"), **words)
    out = checkpoints.open_folder(arguments.out)
    print(json.dumps(dataclasses.asdict(run)), file=sys.stderr)
    row = train.train(run, out=out / "runs" / run.id, data_dir=arguments.data_dir, resume=arguments.resume)
    results.append(row, out / "results.csv")
    results.show([row])
    print(f"Added to {out}/results.csv; losses and checkpoint in {out}/runs/{run.id}.")
    return 0 if row.status == "ok" else commands.FAILED


if __name__ == "__main__":
    sys.exit(commands.explained("train", main))
