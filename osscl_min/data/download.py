"""The data of DCASE 2020 Task 2: fetch from Zenodo, verify, unpack into one folder, count.

Exit status of an error: 3 network or server, 4 checksum, 5 full disk, 6 corrupt or hostile zip, 7 no writing.
"""

from __future__ import annotations

import errno
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

from osscl_min.data.clips import BENCHMARK, scan
from osscl_min.data.layouts import TRUTH_FILE, read_truth
from osscl_min.data.store import FULL_DISK, check_space
from osscl_min.runtime.files import UserError, printable, read_json, write_json

NETWORK, CHECKSUM, FULL, CORRUPT, UNWRITABLE = 3, 4, FULL_DISK, 6, 7
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
DEVELOPMENT_TEST = 10868  # clips
KEPT = ".download"  # in the data folder: zips until they are unpacked, and a note on each that was
CLIP = re.compile(rf"(?:^|/)((?:{'|'.join(TYPES)})/(?:train|test)/[^/.\\][^/\\]*\.wav)$")
SPACE = 2.0  # bytes of disk per byte of zip: its clips (noise compresses little) and zips not unpacked yet
LARGEST_RATIO = 10  # of the clips' bytes to the zip's; more is a zip bomb
BAR = {"unit": "B", "unit_scale": True, "disable": None}  # None: quiet without a terminal
STOP = threading.Event()  # set by Ctrl-C
AGAIN = "run the same command again, it resumes"


def download(
    directory: Path | str,
    *,
    parts: Names = PARTS,
    types: Names = TYPES,
    jobs: int = 2,
    mirror: str = "",
    trust_mirror: bool = False,
) -> str:
    """Fetch what is missing of the data set into DIRECTORY/TYPE/{train,test}; returns the inventory.

    An interrupted run resumes. One file's error does not stop the others. `mirror` replaces HOST, also inside
    the records; `trust_mirror` takes its checksums instead of the published `MD5`, for zips packed again.
    """
    for given, known in ((parts, PARTS), (types, TYPES)):
        if not given or set(given) - set(known):
            raise UserError(f"cannot download {','.join(given) or 'nothing'}; choose from {','.join(known)}")
    if jobs < 1:
        raise UserError(f"--jobs {jobs}: give at least 1")
    root, kept, files, number = Path(directory), Path(directory) / KEPT, {}, 0
    host, md5 = (mirror or HOST).rstrip("/"), {} if trust_mirror else MD5
    pooch.get_logger().setLevel("WARNING")
    STOP.clear()
    try:
        kept.mkdir(parents=True, exist_ok=True)
        for left in kept.glob("tmp*"):  # records, and what pooch was fetching when it was killed
            left.unlink()
        for number, pattern in (PARTS[part] for part in parts):
            names = [name for name in dict.fromkeys(map(pattern.format, types)) if not _is_there(root, name)]
            files |= _record(kept, number, names, host, md5) if names else {}
        needed = sum(size * (SPACE - (kept / name).exists()) for name, (size, *_) in files.items())
        check_space(root, needed)
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
    with whole, ThreadPoolExecutor(jobs) as pool:
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
    expected = Counter()
    if os.path.isfile(root / TRUTH_FILE) and "eval-test" in parts:
        expected.update((machine_type, stem[3:5]) for machine_type, stem in read_truth(root / TRUTH_FILE))

    def compare(count: int, known: int) -> str:
        return "as expected" if count == known else f"DIFFERS, {known} expected"

    lines = [f"{'type':<12} id  {'train':>6} {'test':>6}"]
    for machine in BENCHMARK:
        train, test, known = counts[machine, "train"], counts[machine, "test"], expected[machine]
        remark = compare(test, known) if known else "not checked"
        if not train and {"dev", "eval-train"} <= set(parts):
            remark = "DIFFERS, no train clips"
        if machine[0] in types:
            lines.append(f"{machine[0]:<12} {machine[1]}  {train:>6} {test:>6}  {remark}")
    if "dev" in parts and set(types) == set(TYPES):
        test = sum(clip.split == "test" and clip.subset == "development" for clip in clips)
        lines.append(f"development test: {test} clips, {compare(test, DEVELOPMENT_TEST)}")
    return "\n".join(lines)


class _Bar(tqdm):
    def update(self, n=1):  # where a download is stopped
        if STOP.is_set():
            raise UserError("interrupted")
        return super().update(n)


def _fetch(kept: Path, name: str, url: str, checksum: str | None = None) -> None:
    """Retries after any error of the network and a wrong checksum; 60 s without a byte are an error."""
    store = pooch.create(
        path=kept, base_url="", registry={name: checksum}, urls={name: url}, retry_if_failed=3
    )
    with _Bar(desc=name, total=1, leave=False, **BAR) as bar:  # pooch sets the total
        store.fetch(name, downloader=pooch.HTTPDownloader(progressbar=bar, chunk_size=1 << 20, timeout=60))


def _is_there(root: Path, name: str) -> bool:
    try:
        members = read_json(root / KEPT / f"{name}.json")["members"]
        return all((root / member).stat().st_size == size for member, size in members.items())
    except (UserError, OSError, LookupError, TypeError, AttributeError):
        return False


def _record(
    kept: Path, number: int, names: Names, host: str, md5: dict[str, str]
) -> dict[str, tuple[int, str, str]]:
    """Ask a record for its files: name -> size (bytes), checksum, url."""
    url, file, files = f"{host}/api/records/{number}", f"tmp{number}.json", {}
    _fetch(kept, file, url)
    try:
        listed = {entry["key"]: entry for entry in read_json(kept / file)["files"]}
        for name in names:
            entry, address = listed[name], listed[name]["links"]["self"].replace(HOST, host, 1)
            files[name] = int(entry["size"]), str(entry["checksum"]), address
    except (UserError, ValueError, OverflowError, LookupError, TypeError, AttributeError) as error:
        raise UserError(f"{url}: not a record with the files {', '.join(names)}", NETWORK) from error
    for name, (_, checksum, address) in files.items():
        if name in md5 and checksum != f"md5:{md5[name]}":
            raise UserError(
                f"{address}: the server's file has the checksum {printable(checksum)}, the published one "
                f"md5:{md5[name]}; not fetched (--trust-mirror takes the server's word)",
                CHECKSUM,
            )
    return files


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
            unpacked, packed = sum(item.file_size for item in places.values()), source.stat().st_size
            if unpacked > LARGEST_RATIO * packed:
                sizes = f"its clips would take {unpacked / 1e6:.3g} MB, the zip {packed / 1e6:.3g} MB"
                raise UserError(f"{source}: not unpacked, {sizes}", CORRUPT)
            check_space(root, unpacked)
            for place, item in places.items():
                (part / place).parent.mkdir(parents=True, exist_ok=True)
                with archive.open(item) as member, open(part / place, "wb") as file:
                    shutil.copyfileobj(member, file, 1 << 20)  # checks the clip's CRC at its end
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
        case requests.RequestException(response=answer):
            reason = type(error).__name__ if answer is None else f"{answer.status_code} {answer.reason}"
            status, text = NETWORK, f"{url}: cannot be fetched ({reason}); check the network, {AGAIN}"
        case zipfile.BadZipFile() | zlib.error() | EOFError() | RuntimeError() | UnicodeError():
            status, text = CORRUPT, f"{url}: a corrupt zip ({error}), though its checksum is right"
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
