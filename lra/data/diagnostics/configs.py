"""The diagnostic tasks that are listed: name -> configuration -> generator. The first configuration is the usual one."""

from subquad.lra.data.diagnostics.drawing import Diagnostic
from subquad.lra.data.diagnostics.recall import Recall
from subquad.lra.data.diagnostics.selective_copy import SelectiveCopy

# Any change of what a generator draws is a new version.
VERSION = "1.0.0"
CONFIGS: dict[str, dict[str, Diagnostic]] = {
    "recall": {"small": Recall()},
    # The paper draws anew at every step: 400,000 of 64.
    "selective_copy": {"small": SelectiveCopy(context=40, data=6), "mamba": SelectiveCopy(train=25_600_000)},
}
