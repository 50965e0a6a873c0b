"""Runs commands of the package one after the other: a JSON line in (argv, folder, input), a JSON line out."""

import io
import json
import os
import signal
import sys
import tempfile
import traceback


def main() -> None:
    from osscl_min.cli import main as osscl

    answers = os.fdopen(os.dup(1), "w", buffering=1)
    tasks = os.fdopen(os.dup(0), "r")
    answers.write("{}\n")
    for line in tasks:
        task = json.loads(line)
        os.chdir(task["folder"])
        with (
            tempfile.TemporaryFile() as given,
            tempfile.TemporaryFile() as out,
            tempfile.TemporaryFile() as err,
        ):
            given.write(task["input"].encode("utf-8", "surrogateescape"))
            given.seek(0)
            for number, file in enumerate((given, out, err)):
                os.dup2(file.fileno(), number)
            sys.stdin = io.TextIOWrapper(open(0, "rb", closefd=False), encoding="utf-8")
            sys.argv = ["osscl", *(os.fsdecode(os.fsencode(argument)) for argument in task["argv"])]
            signal.signal(signal.SIGINT, signal.default_int_handler)
            try:
                osscl()
                status = 0
            except SystemExit as ended:
                status = ended.code if isinstance(ended.code, int) else int(bool(ended.code))
            except BaseException:  # noqa: BLE001 - what the interpreter would print
                traceback.print_exc()
                status = 1
            sys.stdout.flush()
            sys.stderr.flush()
            out.seek(0)
            err.seek(0)
            answer = {
                "status": status,
                "out": out.read().decode("utf-8", "replace"),
                "err": err.read().decode("utf-8", "replace"),
            }
        answers.write(json.dumps(answer) + "\n")


if __name__ == "__main__":
    main()
