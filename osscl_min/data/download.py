"""The data of DCASE 2020 Task 2: fetched from Zenodo, verified, unpacked into one folder, counted.

Exit status of an error: 3 network or server, 4 checksum, 5 full disk, 6 corrupt or hostile zip, 7 no writing.
"""

import errno
import json
import os
import re
import shutil
import threading
import zipfile
import zlib
from collections import Counter
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pooch
import requests
from tqdm import tqdm

from osscl_min.data.clips import BENCHMARK, TRUTH_FILE, read_truth, scan
from osscl_min.runtime.files import UserError, write_json

NETWORK, CHECKSUM, FULL, CORRUPT, UNWRITABLE = 3, 4, 5, 6, 7
Names = Collection[str]
HOST = "https://zenodo.org"
PARTS = {  # part -> Zenodo record, file
    "dev": (3678171, "dev_data_{}.zip"),
    "eval-train": (3727685, "eval_data_train_{}.zip"),
    "eval-test": (3841772, "eval_data_test_{}.zip"),
    "labels": (3951620, TRUTH_FILE),
}
TYPES = tuple(dict.fromkeys(machine_type for machine_type, _ in BENCHMARK))
DEVELOPMENT_TEST = 10868  # clips
KEPT = ".download"  # in the data folder: zips until they are unpacked, and a note on each that was
CLIP = re.compile(rf"(?:^|/)((?:{'|'.join(TYPES)})/(?:train|test)/[^/.\\][^/\\]*\.wav)$")
SPACE = 2.0  # bytes of disk for a byte of zip: its clips (noise compresses little) and zips not unpacked yet
BAR = {"unit": "B", "unit_scale": True, "disable": None}  # None: quiet without a terminal
STOP = threading.Event()  # set by Ctrl-C
AGAIN = "run the same command again, it goes on from here"


def download(
    directory: Path | str, *, parts: Names = PARTS, types: Names = TYPES, jobs: int = 2, mirror: str = ""
) -> str:
    """Fetch what is missing of the data set into DIRECTORY/TYPE/{train,test}; a run cut short goes on.

    Parameters
    ----------
    directory : Path or str
        What was unpacked into it before and still lies there is not fetched again.
    parts, types : collection of str
        Of `PARTS` and of `TYPES`.
    jobs : int
        Files at a time; one file's error does not stop the others.
    mirror : str, optional
        Replaces https://zenodo.org, in the addresses that the records give, too.

    Returns
    -------
    str
        The inventory.

    Raises
    ------
    UserError
        With the exit status above.
    """
    for given, known in ((parts, PARTS), (types, TYPES)):
        if not given or set(given) - set(known):
            raise UserError(f"cannot download {','.join(given) or 'nothing'}; choose from {','.join(known)}")
    root, kept, files, number = Path(directory), Path(directory) / KEPT, {}, 0
    host = (mirror or HOST).rstrip("/")
    pooch.get_logger().setLevel("WARNING")
    STOP.clear()
    try:
        kept.mkdir(parents=True, exist_ok=True)
        for left in kept.glob("tmp*"):  # records, and what pooch was fetching when it was killed
            left.unlink()
        for number, pattern in (PARTS[part] for part in parts):
            names = [name for name in dict.fromkeys(map(pattern.format, types)) if not _is_there(root, name)]
            files |= _record(kept, number, names, host) if names else {}
        needed = sum(size * (SPACE - (kept / name).exists()) / 1e9 for name, (size, *_) in files.items())
        if needed > (free := shutil.disk_usage(root).free / 1e9):
            raise UserError(f"{root}: {needed:.3g} GB needed and {free:.3g} GB free; make room", FULL)
    except OSError as error:
        raise _explain(error, root, f"{host}/api/records/{number}") from error

    def get(name: str) -> UserError | None:
        size, checksum, url = files[name]
        try:
            _fetch(kept, name, url, checksum)
            write_json(kept / f"{name}.json", {"checksum": checksum, "members": _place(root, name)})
            (kept / name).unlink(missing_ok=True)
            whole.update(size)
        except Exception as error:
            return _explain(error, root, url)

    whole = tqdm(total=sum(size for size, *_ in files.values()), desc="in all", **BAR)
    with whole, ThreadPoolExecutor(max(jobs, 1)) as pool:
        try:
            errors = [error for error in pool.map(get, files) if error]
        finally:  # after Ctrl-C the others stop at their next piece
            STOP.set()
            pool.shutdown(cancel_futures=True)
    if errors:
        raise UserError(f"{errors[0]} ({len(errors)} of {len(files)} files failed)", errors[0].exit_status)
    return inventory(root, parts, types)


def inventory(root: Path, parts: Names, types: Names) -> str:
    """Count clips by type and id, beside the counts of test clips that are known for certain."""
    try:
        clips = scan(root).clips
    except UserError as error:
        return f"downloaded, but no inventory: {error}"
    counts = Counter((clip.machine, clip.split) for clip in clips)
    truth = read_truth(root / TRUTH_FILE) if (root / TRUTH_FILE).is_file() and "eval-test" in parts else {}
    expected = Counter((machine_type, stem[3:5]) for machine_type, stem in truth)
    lines = [f"{'type':<12} id  {'train':>6} {'test':>6}"]
    for machine in (machine for machine in BENCHMARK if machine[0] in types):
        train, test, known = counts[machine, "train"], counts[machine, "test"], expected[machine]
        remark = (
            "not checked" if not known else "as expected" if test == known else f"DIFFERS, {known} expected"
        )
        remark = remark if train or not set(parts) >= {"dev", "eval-train"} else "DIFFERS, no train clips"
        lines.append(f"{machine[0]:<12} {machine[1]}  {train:>6} {test:>6}  {remark}")
    if "dev" in parts and set(types) == set(TYPES):
        test = sum(clip.split == "test" and clip.subset == "development" for clip in clips)
        remark = "as expected" if test == DEVELOPMENT_TEST else f"DIFFERS, {DEVELOPMENT_TEST} expected"
        lines.append(f"development test: {test} clips, {remark}")
    return "\n".join(lines)


class _Bar(tqdm):
    def update(self, n=1):  # where a download is stopped
        if STOP.is_set():
            raise UserError("interrupted")
        return super().update(n)


def _fetch(kept: Path, name: str, url: str, checksum: str | None = None) -> None:
    """Tries again after any error of the network and a wrong checksum; 60 s without a byte are one."""
    store = pooch.create(
        path=kept, base_url="", registry={name: checksum}, urls={name: url}, retry_if_failed=3
    )
    with _Bar(desc=name, total=1, leave=False, **BAR) as bar:  # pooch sets the total
        store.fetch(name, downloader=pooch.HTTPDownloader(progressbar=bar, chunk_size=1 << 20, timeout=60))


def _is_there(root: Path, name: str) -> bool:
    try:
        members = json.loads((root / KEPT / f"{name}.json").read_text())["members"]
        return all((root / member).stat().st_size == size for member, size in members.items())
    except (OSError, ValueError, KeyError):
        return False


def _record(kept: Path, number: int, names: Names, host: str) -> dict[str, tuple[int, str, str]]:
    """Ask a record for its files: name -> size (bytes), checksum, url."""
    url, file = f"{host}/api/records/{number}", f"tmp{number}.json"
    _fetch(kept, file, url)
    try:
        listed = {entry["key"]: entry for entry in json.loads((kept / file).read_bytes())["files"]}
        urls = {name: listed[name]["links"]["self"].replace(HOST, host, 1) for name in names}
        return {
            name: (int(listed[name]["size"]), str(listed[name]["checksum"]), urls[name]) for name in names
        }
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{url}: not a record with the files {', '.join(names)}", NETWORK) from error


def _place(root: Path, name: str) -> dict[str, int]:
    """Move what a verified file holds to its place, clips when all are unpacked: path -> size (bytes)."""
    source = root / KEPT / name
    if source.suffix != ".zip":
        os.replace(source, root / name)
        return {name: (root / name).stat().st_size}
    part = source.with_suffix(".part")
    try:
        with zipfile.ZipFile(source) as archive:
            for member in archive.namelist():
                if ".." in re.split(r"[/\\]", member) or re.match(r"[/\\]|\w:", member):
                    raise UserError(f"{source}: not unpacked, {member!r} would leave the folder", CORRUPT)
            places = {match[1]: item for item in archive.infolist() if (match := CLIP.search(item.filename))}
            if not places:
                raise zipfile.BadZipFile("no TYPE/train/*.wav or TYPE/test/*.wav in it")
            for place, item in places.items():
                (part / place).parent.mkdir(parents=True, exist_ok=True)
                with archive.open(item) as packed, open(part / place, "wb") as file:
                    shutil.copyfileobj(packed, file, 1 << 20)  # checks the clip's CRC at its end
        for place in places:
            (root / place).parent.mkdir(parents=True, exist_ok=True)
            os.replace(part / place, root / place)
        return {place: item.file_size for place, item in places.items()}
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _explain(error: Exception, root: Path, url: str) -> UserError:
    if isinstance(error, UserError) and error.exit_status == 2 and error.__cause__:  # of `replacing`
        error = error.__cause__
    match error:
        case UserError():
            return error
        case requests.RequestException():
            answer = error.response
            said = type(error).__name__ if answer is None else f"{answer.status_code} {answer.reason}"
            return UserError(f"{url}: cannot be fetched ({said}); check the network, {AGAIN}", NETWORK)
        case zipfile.BadZipFile() | zlib.error() | EOFError() | RuntimeError() | UnicodeError():
            return UserError(f"{url}: a corrupt zip ({error}), though its checksum is right", CORRUPT)
        case OSError(errno=errno.ENOSPC | errno.EDQUOT):
            return UserError(f"{root}: the disk is full; free some space, {AGAIN}", FULL)
        case OSError():
            return UserError(f"{error.filename or root}: cannot be written ({error.strerror})", UNWRITABLE)
        case ValueError():  # pooch's word for it
            return UserError(f"{url}: wrong checksum, also when fetched again; not kept; {AGAIN}", CHECKSUM)
    raise error
