"""MultiNLI (Williams et al., NAACL 2018): English training pairs for natural language inference.

* Published zip: `multinli_1.0_{train,dev_matched}.jsonl`, 392,702 and 10,000 rows, of which 185 dev rows have "-" for
  a label: nobody agreed on one, and they are left out. dev_mismatched is not read.
* GLUE: `train.tsv`, `dev_matched.tsv`, tab-separated without quoting; hub `nyu-mll/glue` (configuration "mnli").
* Hub `nyu-mll/multi_nli`: splits train, validation_matched.
* Samples as `en/{train,dev}.json`, one object of `{text_a, text_b, label}` objects.
"""

from __future__ import annotations

from .folder import FolderTask
from .hub import HubSet
from .layout import Layout
from .table import Table

MNLI = FolderTask(
    name="mnli",
    labels=("entailment", "neutral", "contradiction"),
    tables=(
        Table("text_a", "text_b", quoted=False),
        Table("sentence1", "sentence2", label="gold_label", id="pairID", quoted=False, unlabelled=("-",)),
        Table("premise", "hypothesis", quoted=False),
    ),
    english="en",
    mt_codes={"en": "eng_Latn"},
    hubs=(
        HubSet("nyu-mll/multi_nli", {"en": "default"}, closed=True),
        HubSet("nyu-mll/glue", {"en": "mnli"}, closed=True),
    ),
    layouts=(
        Layout(),
        Layout("multinli_1.0_{split}", languages=("en",), endings=(".jsonl",)),
        Layout("{split}", languages=("en",), endings=(".tsv",)),
    ),
)
