"""Downloads and uploads by hand: `python -m wmtp.storage get s3://bucket/key`, `upload <folder> s3://bucket/prefix`."""

import argparse
from pathlib import Path

from wmtp.errors import clear_errors
from wmtp.storage import StorageError, local_copy
from wmtp.storage.names import split_uri
from wmtp.storage.remote_output import RemoteOutput


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m wmtp.storage", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    get = commands.add_parser("get", help="mirror an object or folder into the cache and print where it is")
    get.add_argument("uri")
    send = commands.add_parser(
        "upload", help="upload the files of a run's folder that are not in S3 yet, manifests last"
    )
    send.add_argument("folder", type=Path)
    send.add_argument("uri")
    args = parser.parse_args()
    with clear_errors():
        if args.command == "get":
            print(local_copy(args.uri))
            return
        if not args.folder.is_dir():
            raise StorageError(f"folder {args.folder} does not exist")
        split_uri(args.uri)
        output = RemoteOutput(args.uri, args.folder)
        output.claim()
        output.close()


if __name__ == "__main__":
    main()
