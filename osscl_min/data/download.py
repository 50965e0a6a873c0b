"""The data of DCASE 2020 Task 2: fetch from Zenodo, verify, unpack into one folder, count.

Exit status of an error: 3 network or server, 4 checksum, 5 full disk, 6 corrupt or hostile zip, 7 no writing.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import zipfile
import zlib
from collections import Counter
from collections.abc import Collection
from pathlib import Path

import pooch
import requests
from tqdm import tqdm

from osscl_min.data.clips import BENCHMARK, scan
from osscl_min.data.layouts import TRUTH_FILE
from osscl_min.data.store import FULL_DISK, check_space
from osscl_min.runtime.files import UserError, printable, read_json, replacing, write_json

NETWORK, CHECKSUM, FULL, CORRUPT, UNWRITABLE = 3, 4, FULL_DISK, 6, 7
AGAIN = "run the same command again, it resumes"
Names = Collection[str]
HOST = "https://zenodo.org"
PARTS = {  # part -> Zenodo record, file
    "dev": (3678171, "dev_data_{}.zip"),
    "eval-train": (3727685, "eval_data_train_{}.zip"),
    "eval-test": (3841772, "eval_data_test_{}.zip"),
    "labels": (3951620, TRUTH_FILE),
}
TYPES = tuple(dict.fromkeys(machine_type for machine_type, _ in BENCHMARK))
# MD5 sums of the zips, from soundata (github.com/soundata/soundata, soundata/datasets/dcase2020task2.py).
# The one of eval_data_list.csv is not published there: for it the server is trusted.
MD5 = {
    "dev_data_fan.zip": "649bdfc06263ae7a838963f43b6641e6",
    "dev_data_pump.zip": "90e7091ef722b7238a7f1009365779cd",
    "dev_data_slider.zip": "da24a757719f0d94d5aa2d646bbfdc86",
    "dev_data_ToyCar.zip": "4dec75ca8d9f666aa9e4c1894a740501",
    "dev_data_ToyConveyor.zip": "03b6aa1bfd09a39d53af0ba39f71fa91",
    "dev_data_valve.zip": "34d2672f55bb041589ef79c10dc89934",
    "eval_data_train_fan.zip": "567798854130c8019df8b664c095ed1e",
    "eval_data_train_pump.zip": "4e33ae9c0db5cc88437675f5e317caee",
    "eval_data_train_slider.zip": "f84f186f4295fc23754abcdd1b0580a7",
    "eval_data_train_ToyCar.zip": "a5d4ccd498af70b04dd74b644b820006",
    "eval_data_train_ToyConveyor.zip": "0e808ac0b761e9fb13d5e0c65caff00d",
    "eval_data_train_valve.zip": "057cdd560caffb8305449541afd28c6d",
    "eval_data_test_fan.zip": "1eb9356a768cadfd0f2e59a5c57e578b",
    "eval_data_test_pump.zip": "23a8f8f924be218c69df67fe07360348",
    "eval_data_test_slider.zip": "0193c769073840332ce3aad84b1ccaa2",
    "eval_data_test_ToyCar.zip": "bea2bdd612f616be8f2b8eb087b32c7c",
    "eval_data_test_ToyConveyor.zip": "ccfcc9847c7d3404d7ee9d6d9e0b2ba2",
    "eval_data_test_valve.zip": "f69c551d2088691050d20cccca9d631c",
}
KEPT = ".download"  # in the data folder: zips until they are unpacked, and a note on each that was
CLIP = re.compile(rf"(?:^|/)((?:{'|'.join(TYPES)})/(?:train|test)/[^/.\\][^/\\]*\.wav)$")


def download(
    directory: Path | str,
    *,
    parts: Names = PARTS,
    types: Names = TYPES,
    mirror: str = "",
    trust_mirror: bool = False,
) -> str:
    """Fetch what is missing of the data set into DIRECTORY/TYPE/{train,test}; returns counts of its clips.

    The next call resumes after an error. `mirror` replaces HOST; with `trust_mirror`, its zips may differ
    from the published `MD5`.
    """
    for given, known in ((parts, PARTS), (types, TYPES)):
        if not given or set(given) - set(known):
            raise UserError(f"cannot download {','.join(given) or 'nothing'}; choose from {','.join(known)}")
    root = Path(directory)
    pooch.get_logger().setLevel("WARNING")
    files = {pattern.format(name): number for number, pattern in map(PARTS.get, parts) for name in types}
    for name, number in files.items():
        url = f"{(mirror or HOST).rstrip('/')}/api/records/{number}/files/{name}/content"
        try:
            if not _is_there(root, name):
                _fetch(root / KEPT, name, url, None if trust_mirror else MD5.get(name))
                write_json(root / KEPT / f"{name}.json", {"members": _place(root, name)})
                (root / KEPT / name).unlink(missing_ok=True)
        except Exception as error:
            explained = _explain(error, root, url)
            if explained.exit_status == CORRUPT:
                (root / KEPT / name).unlink()
            raise explained from error
    try:
        counts = Counter((clip.machine, clip.split) for clip in scan(root).clips)
    except UserError as error:  # the labels alone
        return f"downloaded, but no clips to count: {error}"
    lines = [f"{'type':<12} id  {'train':>6} {'test':>6}"]
    for machine in BENCHMARK:
        train, test = counts[machine, "train"], counts[machine, "test"]
        lines.append(f"{machine[0]:<12} {machine[1]}  {train:>6} {test:>6}")
    return "\n".join(lines)


def _is_there(root: Path, name: str) -> bool:
    try:
        members = read_json(root / KEPT / f"{name}.json")["members"]
        return all((root / member).stat().st_size == size for member, size in members.items())
    except (UserError, OSError):
        return False


def _fetch(kept: Path, name: str, url: str, md5: str | None) -> None:
    """Retries after any error of the network and a wrong checksum; 60 s without a byte are an error."""
    kept.mkdir(parents=True, exist_ok=True)
    for left in kept.glob("tmp*"):  # by a run that was killed
        left.unlink()
    files = {"registry": {name: md5 and f"md5:{md5}"}, "urls": {name: url}}
    store = pooch.create(path=kept, base_url="", retry_if_failed=3, **files)
    bar = tqdm(desc=name, total=1, unit="B", unit_scale=True, disable=None)  # pooch sets the total
    with bar:
        store.fetch(name, downloader=pooch.HTTPDownloader(progressbar=bar, chunk_size=1 << 20, timeout=60))


def _place(root: Path, name: str) -> dict[str, int]:
    """Move a verified file, or the clips of a zip, to their places: path -> size (bytes)."""
    source = root / KEPT / name
    if source.suffix != ".zip":
        os.replace(source, root / name)
        return {name: (root / name).stat().st_size}
    with zipfile.ZipFile(source) as archive:
        places = {match[1]: item for item in archive.infolist() if (match := CLIP.search(item.filename))}
        if not places:
            raise zipfile.BadZipFile("no TYPE/train/*.wav or TYPE/test/*.wav in it")
        check_space(root, sum(item.file_size for item in places.values()))
        for place, item in places.items():
            with archive.open(item) as member, replacing(root / place, "wb") as file:
                shutil.copyfileobj(member, file)  # checks the clip's CRC at its end
    return {place: item.file_size for place, item in places.items()}


def _explain(error: Exception, root: Path, url: str) -> UserError:
    if isinstance(error, UserError) and error.__cause__:  # of `replacing`
        error = error.__cause__
    match error:
        case UserError():
            return error
        case requests.RequestException(response=answer):
            reason = type(error).__name__ if answer is None else f"{answer.status_code} {answer.reason}"
            status, text = NETWORK, f"{url}: cannot be fetched ({reason}); check the network, {AGAIN}"
        case zipfile.BadZipFile() | zlib.error() | EOFError() | RuntimeError() | UnicodeError():
            status, text = CORRUPT, f"{url}: a corrupt zip ({error}); not kept; {AGAIN}"
        case OSError(errno=errno.ENOSPC | errno.EDQUOT):
            status, text = FULL, f"{printable(root)}: the disk is full; free some space, {AGAIN}"
        case OSError():
            name = printable(error.filename or root)
            status, text = UNWRITABLE, f"{name}: cannot be written ({error.strerror})"
        case ValueError():  # pooch's word for it
            status, text = CHECKSUM, f"{url}: wrong checksum, also when fetched again; not kept; {AGAIN}"
        case _:
            raise error
    return UserError(text, status)
