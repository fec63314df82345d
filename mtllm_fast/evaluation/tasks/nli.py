"""Natural language inference: the sets share labels and a head, and differ in files and languages.

`NLI` reads any of them and tells them apart by what stands in the files; the tasks named after one set only read that.

* MultiNLI (Williams et al., NAACL 2018), English: `mnli.py`.
* XNLI (Conneau et al., EMNLP 2018), 15 languages: `xnli.py`.
* AmericasNLI (Ebrahimi et al., ACL 2022), 10 languages: `americasnli.py`.
* Kardeş-NLU (Senel et al., EACL 2024), 5 Turkic languages: `kardesnlu.py`.
* Parquet or JSON with premise, hypothesis and label: the NLLB translations that the authors of MT-LLM published.
"""

from __future__ import annotations

from .americasnli import AMERICASNLI
from .folder import FolderTask
from .kardesnlu import KARDESNLU
from .layout import Layout
from .mnli import MNLI
from .xnli import XNLI

_SETS = (XNLI, AMERICASNLI, KARDESNLU, MNLI)
_TABLES = [table for task in _SETS for table in task.tables]
# a table without header fits everything, and one that asks for fewer columns fits files of another: these come last
_TABLES.sort(key=lambda table: (table.header is not None, -len(table.required())))

NLI = FolderTask(
    name="nli",
    about="The task (natural language inference) is to say whether a second sentence follows from the first, "
    "contradicts it, or neither.",
    labels=XNLI.labels,
    tables=tuple(table for index, table in enumerate(_TABLES) if table not in _TABLES[:index]),
    english="en",
    mt_codes={code: mt for task in (XNLI, AMERICASNLI, KARDESNLU) for code, mt in (task.mt_codes or {}).items()},
    label_files=XNLI.label_files,
    hubs=tuple(hub for task in (XNLI, AMERICASNLI, MNLI) for hub in task.hubs),
    layouts=(Layout(), *(layout for task in _SETS for layout in task.layouts if layout != Layout())),
    notes={code: note for task in _SETS for code, note in task.notes.items()},
)
