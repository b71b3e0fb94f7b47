"""Moving one object from and to S3 beside `aws s3 cp`, both against a moto server on this machine.

    python benchmarks/storage.py [--megabytes 1024] [--rounds 3]

Every contender is a process of its own, with its start-up in the time, and writes to the same disk. The download is
`wmtp.storage.local_copy` into an empty cache: content held against its SHA-256, on disk (fsync) before it has its name;
`aws s3 cp` does neither. The upload is the one of checkpoints and exports: SHA-256 first, each part held against its
ETag. They take turns, round after round; the ratio is the median over rounds of that round's.

The server is one Python process and shares the cores with its clients: it, not they, may be what limits both. Figures
here say how the two compare, not how fast S3 is.

One JSON line per figure: name, value, unit, against.
"""

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import boto3
from figures import report

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from services import AWS_ENVIRONMENT, moto_server  # noqa: E402

BAR = 0.80
URI = "s3://bench/object"


def timed(command: list[str], environment: dict[str, str]) -> float:
    started = time.perf_counter()
    subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - started


def contenders(folder: Path, url: str) -> dict[tuple[str, str], tuple[list[str], dict[str, str]]]:
    """Command and environment by direction and name."""
    plain = {k: v for k, v in os.environ.items() if not k.startswith(("AWS_", "WMTP_", "PYTHONPATH"))}
    plain |= {**AWS_ENVIRONMENT, "AWS_ENDPOINT_URL": url}
    ours = {**plain, "PYTHONPATH": str(ROOT), "WMTP_CACHE": str(folder / "cache")}
    python = [sys.executable, "-c"]
    found = {
        ("download", "wmtp"): ([*python, f"from wmtp.storage import local_copy; local_copy('{URI}')"], ours),
        ("upload", "wmtp"): (
            [*python, f"from pathlib import Path; from wmtp.storage.transfer import upload; "
                      f"upload(Path('{folder / 'object'}'), '{URI}')"],
            ours,
        ),
    }  # fmt: skip
    aws = shutil.which("aws")
    if aws is None:
        print("NO aws ON PATH: wmtp is measured alone, nothing is compared", file=sys.stderr)
    else:
        copy = [aws, "s3", "cp", "--only-show-errors"]
        found["download", "aws"] = ([*copy, URI, str(folder / "copy")], plain)
        found["upload", "aws"] = ([*copy, str(folder / "object"), URI], plain)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()

    with tempfile.TemporaryDirectory() as name, moto_server() as url:
        folder = Path(name)
        with (folder / "object").open("wb") as file:
            for _ in range(args.megabytes):
                file.write(os.urandom(1 << 20))
        boto3.client("s3", endpoint_url=url, **{
            "aws_access_key_id": AWS_ENVIRONMENT["AWS_ACCESS_KEY_ID"],
            "aws_secret_access_key": AWS_ENVIRONMENT["AWS_SECRET_ACCESS_KEY"],
            "region_name": AWS_ENVIRONMENT["AWS_DEFAULT_REGION"],
        }).create_bucket(Bucket="bench")  # fmt: skip
        by_name = contenders(folder, url)
        seconds = {key: [] for key in by_name}
        for number in range(args.rounds):
            turn = sorted(by_name, key=lambda key: (key[0] == "download", key[1]), reverse=bool(number % 2))
            # An upload before the first download, and whose object a download meets changes from round to round.
            for key in sorted(turn, key=lambda key: key[0] == "download"):
                shutil.rmtree(folder / "cache", ignore_errors=True)
                (folder / "copy").unlink(missing_ok=True)
                seconds[key].append(timed(*by_name[key]))

    where = f"one object of {args.megabytes} MiB, moto on {os.cpu_count()} shared cores"
    for (direction, who), times in sorted(seconds.items()):
        report(f"S3 {direction}, {who}", args.megabytes / statistics.median(times), "MiB/s", where)
    for direction in ("download", "upload"):
        if (direction, "aws") in seconds:
            pairs = zip(seconds[direction, "aws"], seconds[direction, "wmtp"], strict=True)
            ratio = statistics.median(theirs / ours for theirs, ours in pairs)
            report(f"S3 {direction}, speed", ratio, "x", f"aws s3 cp; bar >= {BAR}")


if __name__ == "__main__":
    main()
