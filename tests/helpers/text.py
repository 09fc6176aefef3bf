"""Made-up text for tests."""

import gzip
import json
import random
from pathlib import Path


def words(length: int, seed: int = 0) -> bytes:
    """Words of random letters, ``length`` bytes."""
    rng = random.Random(seed)
    text = " ".join("".join(rng.choices("abcdefghijklmnop", k=rng.randint(1, 9))) for _ in range(length))
    return text[:length].encode()


def write_documents(folder: Path, *, train: int, validation: int) -> Path:
    """A folder with one document of so many bytes for each split, as C4 lays them out."""
    (folder / "en").mkdir(parents=True)
    for seed, (split, length) in enumerate({"train": train, "validation": validation}.items()):
        with gzip.open(folder / f"en/books-{split}.00000-of-00001.json.gz", "wt", encoding="utf-8") as file:
            file.write(json.dumps({"text": words(length, seed).decode()}) + "\n")
    return folder
