"""Find the sentence of one language that says what a sentence of another says.

    python examples/retrieve.py --model runs/adapted --english english.txt --other swahili.txt --language swh_Latn

Both files have one text a line. Prints each line of `other` with the English line nearest to it, by cosine of the
pooled states.
"""

import argparse
from pathlib import Path

import numpy as np

from mtllm_fast import Engine


def unit(states: np.ndarray) -> np.ndarray:  # (N, D) -> (N, D)
    return states / np.linalg.norm(states, axis=1, keepdims=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True, help="folder of an adapted model")
    parser.add_argument("--english", type=Path, required=True)
    parser.add_argument("--other", type=Path, required=True)
    parser.add_argument("--language", help="code of `other`, where the encoder has language codes")
    options = parser.parse_args()
    english, other = (path.read_text(encoding="utf-8").splitlines() for path in (options.english, options.other))
    engine = Engine(options.model)
    coded = options.language is not None
    ours = unit(engine.encode(english, "eng_Latn" if coded else None))
    theirs = unit(engine.encode(other, options.language))
    nearest = (theirs @ ours.T).argmax(1)
    for text, index in zip(other, nearest, strict=True):
        print(f"{text}\t{english[index]}")


if __name__ == "__main__":
    main()
