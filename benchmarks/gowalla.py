"""Matrix factorisation on Gowalla beside published results, through ``embax train``.

    python -m benchmarks.gowalla FOLDER [--validate] [--seeds 0] [--output gowalla-run] [--options "..."]

FOLDER has ``train.txt.gz`` and ``test.txt.gz`` of the NGCF split (29,858 users, 40,981 items; a user and the user's
items in each line). They become Parquet, and ``embax train`` does the rest by the settings in ``SETTINGS``. With
``--validate`` a tenth of the training pairs is the test, and the test file is not touched: settings were chosen so.
All items but the user's training items are ranked; Recall@20 and NDCG@20 are means over users. Published for d = 64:
MF-BPR 0.1627 and 0.1378 (BARS, gowalla_m1). The most popular items, the run's baseline, have 0.0416 and 0.0317.
"""

import argparse
import gzip
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

SETTINGS = ["--task", "retrieval", "--user", "user", "--item", "item", "--l2", "0.4", "--epochs", "12"]
PUBLISHED = {"MF-BPR (BARS)": (0.1627, 0.1378), "NGCF": (0.1570, 0.1327), "LightGCN (BARS)": (0.1820, 0.1547)}


def main() -> None:
    """Trains, and prints the measures beside those published."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--validate", action="store_true")
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--output", type=Path, default=Path("gowalla-run"))
    parser.add_argument("--options", default="", help="further options of embax train")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    for part in ("train", "test"):
        _written(args.folder / f"{part}.txt.gz", args.output / f"{part}.parquet")
    test = ["--test-fraction", "0.1"] if args.validate else ["--test", str(args.output / "test.parquet")]
    command = [sys.executable, "-m", "embax.cli", "train", str(args.output / "train.parquet"), *SETTINGS, *test]
    command += ["--seeds", args.seeds, "--output", str(args.output / "run"), "--overwrite", *args.options.split()]
    if subprocess.run(command).returncode:
        sys.exit(1)
    print(f"{'published, d = 64':<20}{'recall@20':>10}{'ndcg@20':>10}")
    for name, (recall, ndcg) in PUBLISHED.items():
        print(f"{name:<20}{recall:>10.4f}{ndcg:>10.4f}")


def _written(source: Path, path: Path) -> None:
    """Writes the pairs of a text file as Parquet, users in order, items as they come."""
    users, items = [], []
    with gzip.open(source, "rt") as lines:
        for line in lines:
            user, *own = map(int, line.split())
            users.append(np.full(len(own), user, np.int32))
            items.append(np.array(own, np.int32))
    pq.write_table(pa.table({"user": np.concatenate(users), "item": np.concatenate(items)}), path)


if __name__ == "__main__":
    main()
