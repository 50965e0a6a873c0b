"""OS-SCL anomalous sound detection. Every command has its own --help; --version prints the version.

Settings start from a preset, by default small, for a few hundred clips of 10 s. --preset quick is for the
simulated machines, --preset paper for the published experiment on the whole DCASE 2020 benchmark.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

import tyro
from tyro.conf import Positional, arg

from osscl_min import __version__
from osscl_min.config import PRESETS, Config, EvaluateConfig
from osscl_min.data.synth import SynthConfig
from osscl_min.runtime.files import UserError, printable

Experiment = Literal["components", "inputs", "training", "precision", "high-frequency-training",
                     "high-frequency", "bands", "noise", "scores", "embeddings", "all"]  # fmt: skip
Data = Annotated[Path, arg(help="Data folder, manifest (.csv) or packed store.")]
Out = Annotated[Path, arg(help="Folder for the results.")]
BestPt = Annotated[Path, arg(help="A run's best.pt, or a .pth file of the authors.")]
Device = Annotated[str, arg(metavar="auto|cpu|cuda|cuda:N", help="Where to compute.")]
Strict = Annotated[bool, arg(help="Stop if any file cannot be used.")]
Channel = Annotated[int | None, arg(help="Channel of files with several; else MIMII's first, or the mean.")]
Preset = Annotated[Literal["paper", "small", "quick"], arg(help="Chooses the defaults of the settings.")]
Settings = Annotated[Config, arg(name="")]


def commands(preset: Config) -> dict[str, Callable]:
    """Every command as a function, with the preset's defaults; imports wait until a command runs."""

    def synth(out: Positional[Out], config: Annotated[SynthConfig, arg(name="")] = SynthConfig()) -> None:
        """Simulate machines: a data folder in the layout of DCASE 2020."""
        from osscl_min.data.synth import write_dataset

        show(write_dataset(out, config))

    def download(
        directory: Positional[Path],
        parts: str = "dev,eval-train,eval-test,labels",
        types: str = "fan,pump,slider,ToyCar,ToyConveyor,valve",
        mirror: str = "",
        trust_mirror: bool = False,
    ) -> None:
        """Download the DCASE 2020 Task 2 data; an interrupted download resumes.

        Exit status: 3 network or server, 4 wrong checksum, 5 disk full, 6 corrupt zip, 7 folder not writable.

        Args:
            directory: The data folder.
            parts: Which parts, separated by commas.
            types: Which machine types, separated by commas.
            mirror: Server to use instead of https://zenodo.org.
            trust_mirror: Take its zips whatever their checksums.
        """
        from osscl_min.data.download import download as run

        chosen = {"parts": parts.split(","), "types": types.split(",")}
        show(run(directory, **chosen, mirror=mirror, trust_mirror=trust_mirror))

    def inspect(
        data: Positional[Data],
        out: Out | None = None,
        seconds: float = preset.model.audio.seconds,
        step: float | None = None,
        preset: Preset = preset.preset,
    ) -> None:
        """Show what a data set holds: counts, lengths, rates, levels, duplicates, conflicts.

        Args:
            out: Folder for inspect.json and inspect.csv.
            seconds: Length of the clips that a training would take.
            step: Seconds between clips of a long recording, by default their length; 0: its first alone.
        """
        from osscl_min.config import AudioConfig
        from osscl_min.data import inspection
        from osscl_min.runtime.tables import markdown

        folder(out)
        audio = AudioConfig(seconds=seconds, clip_step=seconds if step is None else step)
        result = inspection.inspect(data, audio)
        show(f"{markdown(inspection.table(result))}\n{inspection.remarks(result)}".strip())
        if out is not None:
            inspection.write(result, out)

    def pack(
        data: Positional[Data],
        store: Positional[Path],
        verify: bool = False,
        jobs: int | None = None,
        channel: Channel = None,
        sample_rate: int = preset.model.audio.sample_rate,
        seconds: float = preset.model.audio.seconds,
        step: float | None = None,
        preset: Preset = preset.preset,
    ) -> None:
        """Decode every clip once, into a packed store that train and evaluate read instead of the data.

        Args:
            store: The store's folder; the same command resumes an interrupted one or updates it.
            verify: Check every file and every packed clip against its hash.
            jobs: Parallel workers; all cores by default.
            sample_rate: Sample rate of the packed clips, Hz.
            seconds: Length of the packed clips.
            step: Seconds between clips of a long recording, by default their length; 0: its first alone.
        """
        from osscl_min.config import AudioConfig
        from osscl_min.data.store import pack as run

        step = seconds if step is None else step
        audio = AudioConfig(sample_rate=sample_rate, seconds=seconds, clip_step=step)
        show(run(data, store, audio, channel=channel, verify=verify, jobs=jobs))

    def train(
        data: Data,
        out: Out,
        config: Settings = preset,
        others: Annotated[str | None, arg(name="with", metavar="DIR|simulated")] = None,
        device: Device = "auto",
        strict: Strict = False,
        resume: bool = False,
        seeds: Annotated[str, arg(metavar="0,1,2")] = "",
    ) -> None:
        """Train a detector on the normal clips of a data folder; an interrupted run resumes.

        Args:
            out: The run's folder.
            others: Other machines to tell yours from, needed where there is only one.
            resume: Fail unless there is a run to resume.
            seeds: Train and evaluate once per seed, into OUT/runs, and average.
        """
        from osscl_min.train import train as run

        folder(out)
        if seeds:
            if not all(seed.strip().isdecimal() for seed in seeds.split(",")):
                raise UserError(f"--seeds takes whole numbers separated by commas, not {seeds!r}")
            if others or strict or resume:
                raise UserError("--seeds does not go with --with, --strict or --resume")
            run_experiment("seeds", data, out, config, seeds=list(map(int, seeds.split(","))), device=device)
        show(run(data, out, config, others=others, device=device, strict=strict, resume=resume))

    def evaluate(
        checkpoint: BestPt,
        data: Data,
        out: Out,
        config: Annotated[EvaluateConfig, arg(name="")] = preset.evaluate,
        preset: Preset = preset.preset,
        device: Device = "auto",
        strict: Strict = False,
    ) -> None:
        """Score the test clips of a data folder and write scores, AUC and pAUC."""
        from osscl_min.evaluate import evaluate as run
        from osscl_min.metrics import table
        from osscl_min.runtime.tables import markdown

        folder(out)
        result = run(checkpoint, data, out, config=config, device=device, strict=strict)
        if first_process() and result["metrics"] is None:
            show(f"scored {result['clips']} clips, none with a known truth: {out / 'scores.csv'}")
        elif first_process():
            show(markdown(table(result["metrics"])))

    def score(
        checkpoint: Positional[BestPt],
        files: Positional[tuple[str, ...]],
        machine: str | None = None,
        id: str | None = None,
        false_alarm_rate: float = 0.05,
        calibrate: tuple[str, ...] = (),
        window_step: float | None = None,
        csv: Path | None = None,
        json: Path | None = None,
        plot: Path | None = None,
        explain: Path | None = None,
        batch_size: int | None = None,
        channel: Channel = None,
        device: Device = "auto",
    ) -> None:
        """Score recordings of a machine and decide which are anomalous.

        Exit status: 0 if everything was scored, 1 if files or windows were skipped, 2 for an error.

        Args:
            files: Sound files, folders, manifests (.csv), or - for names on standard input.
            machine: Machine type of all files; by default from their folders and names (fan/id_00/...).
            id: Machine id of all files; an unknown one is scored against every id of its type.
            false_alarm_rate: Share of normal recordings that may be called anomalous.
            calibrate: Further normal recordings that were never trained on, to set the thresholds with. Each
                counts once; for long recordings, give ones that are as long.
            window_step: Seconds between windows of a long recording; half a window by default.
            csv: Output file, one row per recording.
            json: Output file, with the scores over time of long recordings.
            plot: Picture of the most anomalous recording: scores over time and spectrogram.
            explain: Picture of its highest window: which frequencies and times raise the score.
            batch_size: Windows per batch.
        """
        from osscl_min.inference.score import score as run

        scorer, summary = run(
            checkpoint, files, machine_type=machine, machine_id=id, rate=false_alarm_rate,
            calibrate_with=calibrate, step=window_step, batch_size=batch_size, channel=channel, csv_path=csv,
            json_path=json, plot_path=plot, explain_path=explain, device=device,
        )  # fmt: skip
        show(summary.text(scorer))
        sys.exit(bool(summary.skipped or summary.windows_not_scored))

    def metrics(
        scores: Positional[Path], out: Out | None = None, labels: Path | None = None, bootstrap: int = 1000
    ) -> None:
        """Compute AUC and pAUC from any folder of score files in the DCASE format.

        Args:
            scores: Folder with anomaly_score_TYPE_id_XX.csv or TYPE_anomaly_score_id_XX.csv.
            out: Folder for metrics.json and metrics.csv.
            labels: eval_data_list.csv, for file names without normal_ or anomaly_.
            bootstrap: Resamples for the 95 % intervals; 0 for none.
        """
        from osscl_min.metrics import evaluate_scores, read_scores, table, unmatched, write_metrics
        from osscl_min.runtime.tables import markdown

        folder(out)
        rows = read_scores(scores, labels)
        if remark := unmatched(rows, labels):
            print(remark, file=sys.stderr)
        result = evaluate_scores(rows, bootstrap)
        if out is not None:
            write_metrics(result, out)
        show(markdown(table(result)))

    def ablate(
        name: Positional[Experiment],
        data: Data,
        out: Out,
        checkpoint: BestPt | None = None,
        seeds: tuple[int, ...] = (preset.train.seed,),
        variants: tuple[str, ...] = (),
        jobs: int = 1,
        cutoffs: tuple[float, ...] | None = None,
        config: Settings = preset,
        device: Device = "auto",
    ) -> None:
        """Compare variants of the training, or analyse trained detectors.

        Finished runs are reused; a failure does not stop the others, and the exit status is then 1.

        Args:
            name: The first five compare trainings, the next five analyse detectors; all leaves out precision.
            checkpoint: A detector to analyse; by default those of the seeds, trained if needed.
            seeds: Train every variant once per seed.
            variants: Only these, beside the baseline.
            jobs: Parallel trainings.
            cutoffs: Cut-off frequencies in Hz, for high-frequency and high-frequency-training.
        """
        keys = {"seeds": seeds, "only": variants, "checkpoint": checkpoint, "cutoffs": cutoffs, "jobs": jobs}
        run_experiment(name, data, out, config, device=device, **keys)

    def report(run: Positional[Path], data: Data | None = None) -> None:
        """Write a run's report (HTML pages), figures (PNG, PDF) and tables (LaTeX) into the run's folder.

        Args:
            run: The folder of a trained and evaluated run.
            data: Its data; RUN/data by default.
        """
        from osscl_min.report import pages, results

        show(f"report: {pages.write(run, data)}")
        show(f"{results.headline(run)}\n{results.expectation(run)}".strip())

    def bench(
        name: Positional[Literal["model", "train", "data", "score"]], out: Out = Path("results"),
        data: Data | None = None,
    ) -> None:  # fmt: skip
        """Measure the speed of the model, of training, of reading data or of scoring on this machine.

        Args:
            data: For the benchmarks that read data; simulated machines by default.
        """
        from osscl_min.bench import bench as run

        show(run(name, out, data).read_text(encoding="utf-8").strip())

    functions = (synth, download, inspect, pack, train, evaluate, score, metrics, ablate, report, bench)
    return {function.__name__: function for function in functions}


def first_process() -> bool:
    """Whether this process prints results: the only one, or the first of torchrun's."""
    return os.environ.get("RANK", "0") == "0"


def show(text: object) -> None:
    """Print in the first process."""
    if first_process():
        print(text)


def folder(out: Path | None) -> None:
    """Refuse an output folder that is a file, before anything is computed."""
    if out is not None and out.exists() and not out.is_dir():
        raise UserError(f"{printable(out)} is a file; --out takes a folder")


def run_experiment(name: str, data: Path, out: Path, config: Config, **settings: Any) -> NoReturn:
    """Run an experiment, or all, and print the tables; exit status 1 where something failed."""
    from osscl_min.experiments.variants import run, run_all

    folder(out)
    if not settings.get("seeds"):
        raise UserError("--seeds takes at least one number")
    if "RANK" in os.environ:
        raise UserError("experiments train in processes of their own: start them without torchrun")
    all_of = run_all(data, out, config, **settings) if name == "all" else None
    failures = []
    for each, result in all_of or [(name, run(name, data, out, config, **settings))]:
        if isinstance(result, UserError):
            failures.append(f"failed: {each}: {result}")
            continue
        stem = out / each.replace("-", "_")
        show(f"{stem.with_suffix('.md').read_text(encoding='utf-8')}\n{stem.with_suffix('.json')}")
        failures += [f"failed: {variant}: {reason}" for variant, reason in result["failed"].items()]
    print("\n".join(failures), end="\n" if failures else "", file=sys.stderr)
    sys.exit(bool(failures))


def main() -> None:
    """Run one command; a user's error ends in one line and its exit status, mostly 2."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # any file name can be printed
            stream.reconfigure(errors="backslashreplace")
    if sys.argv[1:] == ["--version"]:
        print(f"osscl-min {__version__}")
        return
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--preset", choices=PRESETS, default="small")
    try:
        preset = PRESETS[first.parse_known_args()[0].preset]
        tyro.extras.subcommand_cli_from_dict(commands(preset), prog="osscl", description=__doc__)
    except UserError as error:
        print(f"osscl: {error}", file=sys.stderr)
        sys.exit(error.exit_status)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        print(f"osscl: {error}", file=sys.stderr)
        sys.exit(2)
