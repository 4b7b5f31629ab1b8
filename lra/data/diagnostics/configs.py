"""The diagnostic tasks that are listed: name -> configuration -> generator. The first configuration is the usual one."""

from subquad.lra.data.diagnostics import mad
from subquad.lra.data.diagnostics.drawing import Diagnostic
from subquad.lra.data.diagnostics.induction import Induction
from subquad.lra.data.diagnostics.mqar import MQAR
from subquad.lra.data.diagnostics.recall import Recall
from subquad.lra.data.diagnostics.selective_copy import SelectiveCopy
from subquad.lra.data.diagnostics.state_tracking import WordProblem

# Any change of what a generator draws is a new version.
VERSION = "1.0.0"
# Length and pairs of figure 2.
_ZOOLOGY = ((64, 4), (128, 8), (256, 16), (512, 64))
CONFIGS: dict[str, dict[str, Diagnostic]] = {
    "recall": {"small": Recall(), "overwritten": Recall(keys=8, writes=4)},
    # The paper draws anew at every step: 400,000 of 64.
    "selective_copy": {"small": SelectiveCopy(context=40, data=6), "mamba": SelectiveCopy(train=25_600_000)},
    # 204,800 steps of 8.
    "induction": {"small": Induction(length=64), "mamba": Induction(train=1_638_400)},
    "mqar": {
        "small": MQAR(length=32, pairs=4, vocabulary=64),
        **{f"{length}_{pairs}": MQAR(length=length, pairs=pairs, train=100_000, test=3000) for length, pairs in _ZOOLOGY},
    },
    "parity": {
        "small": WordProblem(group="cyclic", order=2),
        # 20,000 steps of 256.
        "xlstm": WordProblem(group="cyclic", order=2, length=39, shortest=2, asked="last", train=5_120_000, test=8192),
    },
    "modular_addition": {"small": WordProblem(group="cyclic", order=5), "z60": WordProblem(group="cyclic", order=60)},
    "s5": {"small": WordProblem(), "a5": WordProblem(group="alternating")},
    "mad": {
        "in_context_recall": mad.InContextRecall(),
        "fuzzy_recall": mad.FuzzyRecall(),
        "noisy_recall": mad.InContextRecall(vocabulary=32, noise=16, noise_share=0.2),
        "selective_copy": mad.MadSelectiveCopy(),
        "compression": mad.Compression(),
        "memorisation": mad.Memorisation(),
    },
}
