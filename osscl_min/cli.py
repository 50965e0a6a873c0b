"""OS-SCL anomalous sound detection. Every command has its own --help; --version prints the version.

Settings take their defaults from a preset: small (the default) suits a few hundred clips of 10 s, quick suits
the simulated machines, and paper is the published experiment on the whole DCASE 2020 benchmark.

(paper), (code) and (ours) say where a setting comes from: the paper, its authors' code, or this package.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

import tyro
from tyro.conf import Positional, arg

from osscl_min import __version__
from osscl_min.config import PRESETS, AudioConfig, Config, EvaluateConfig
from osscl_min.data.synth import SynthConfig
from osscl_min.runtime.files import UserError, check_output, printable
from osscl_min.runtime.tables import markdown

Experiment = Literal["components", "inputs", "training", "precision", "high-frequency-training",
                     "high-frequency", "bands", "noise", "scores", "embeddings", "all"]  # fmt: skip
Data = Annotated[Path, arg(help="Data folder, manifest (.csv) or packed store.")]
Out = Annotated[Path, arg(help="Folder for the results.")]
BestPt = Annotated[Path, arg(help="A run's best.pt, or a .pth file of the authors.")]
Device = Annotated[str, arg(metavar="auto|cpu|cuda|cuda:N", help="Where to compute.")]
Strict = Annotated[bool, arg(help="Stop if any file cannot be used.")]
Channel = Annotated[int | None, arg(help="Channel of multichannel files; default: mean, or MIMII's first.")]
Score = Literal["auto", "exact", "upstream", "nearest", "profile"]
Preset = Annotated[Literal["paper", "small", "quick"], arg(help="Preset that gives the defaults.")]
Settings = Annotated[Config, arg(name="")]


def commands(preset: Config) -> dict[str, Callable]:
    """Every command as a function, with the preset's defaults; each prints or returns what it found."""

    def synth(directory: Positional[Path], config: Annotated[SynthConfig, arg(name="")] = SynthConfig()):
        """Simulate machines: a data folder in the layout of DCASE 2020.

        Args:
            directory: The data folder.
        """
        return load("data.synth").write_dataset(directory, config)

    def download(
        directory: Positional[Path],
        parts: str = "dev,eval-train,eval-test,labels",
        types: str = "fan,pump,slider,ToyCar,ToyConveyor,valve",
        mirror: str = "",
        trust_mirror: bool = False,
    ):
        """Download the DCASE 2020 Task 2 data; an interrupted download resumes.

        Exit status: 3 network or server, 4 wrong checksum, 5 disk full, 6 corrupt zip, 7 folder not writable.

        Args:
            directory: The data folder.
            parts: Which parts, separated by commas.
            types: Which machine types, separated by commas.
            mirror: Server to use instead of https://zenodo.org.
            trust_mirror: Accept the mirror's zips whatever their checksums.
        """
        chosen = {"parts": parts.split(","), "types": types.split(",")}
        function = load("data.download").download
        return function(directory, **chosen, mirror=mirror, trust_mirror=trust_mirror)

    def inspect(
        data: Positional[Data],
        out: Out | None = None,
        seconds: float = preset.model.audio.seconds,
        step: float | None = None,
        preset: Preset = preset.preset,
    ):
        """Show what a data set holds: counts, lengths, rates, levels, duplicates, conflicts.

        Args:
            out: Folder for inspect.json and inspect.csv.
            seconds: Length of the clips that a training would take.
            step: Seconds between clips of a long recording; by default their length; 0: only the first clip.
        """
        folder(out)
        if out is not None:
            check_output(out / "inspect.csv", [data])
        inspection = load("data.inspection")
        audio = AudioConfig(seconds=seconds, clip_step=seconds if step is None else step)
        result = inspection.inspect(data, audio)
        if out is not None:
            inspection.write(result, out)
        return f"{markdown(inspection.table(result))}\n{inspection.remarks(result)}".strip()

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
    ):
        """Decode every clip once, into a packed store that train and evaluate read instead of the data.

        Args:
            store: The store's folder; the same command resumes an interrupted store or updates it.
            verify: Check every file and every packed clip against its hash.
            jobs: Parallel workers; by default one per core.
            sample_rate: Sample rate of the packed clips, Hz.
            seconds: Length of the packed clips.
            step: Seconds between clips of a long recording; by default their length; 0: only the first clip.
        """
        step = seconds if step is None else step
        audio = AudioConfig(sample_rate=sample_rate, seconds=seconds, clip_step=step)
        return load("data.store").pack(data, store, audio, channel=channel, verify=verify, jobs=jobs)

    def train(
        data: Data,
        out: Out,
        config: Settings = preset,
        others: Annotated[str | None, arg(name="with", metavar="DIR|simulated")] = None,
        device: Device = "auto",
        strict: Strict = False,
        resume: bool = False,
        seeds: Annotated[str, arg(metavar="0,1,2")] = "",
    ):
        """Train a detector on the normal clips of a data folder; an interrupted run resumes.

        Args:
            others: Other machines to tell yours from; needed if you have only one.
            resume: Fail unless there is a run to resume.
            seeds: Train and evaluate once per seed, in OUT/runs, and average the results.
        """
        folder(out)
        if not seeds:
            options = {"others": others, "device": device, "strict": strict, "resume": resume}
            return load("train").train(data, out, config, **options)
        if not all(seed.strip().isdecimal() for seed in seeds.split(",")):
            raise UserError(f"--seeds takes whole numbers separated by commas, not {seeds!r}")
        if others or strict or resume:
            raise UserError("--seeds does not go with --with, --strict or --resume")
        run_experiment("seeds", data, out, config, seeds=list(map(int, seeds.split(","))), device=device)

    def evaluate(
        checkpoint: BestPt,
        data: Data,
        out: Out,
        config: Annotated[EvaluateConfig, arg(name="")] = preset.evaluate,
        preset: Preset = preset.preset,
        device: Device = "auto",
        strict: Strict = False,
    ):
        """Score the test clips of a data folder and write scores, AUC and pAUC."""
        folder(out)
        options = {"config": config, "device": device, "strict": strict}
        result = load("evaluate").evaluate(checkpoint, data, out, **options)
        if not result:
            return None
        if result["metrics"] is None:
            return f"scored {result['clips']} clips, none with a known truth: {out / 'scores.csv'}"
        forms, own = load("checkpoint").SCORES, result["score"]
        others = {name: entry for name, entry in result["forms"].items() if name != own}
        lines = [f"score: {forms[own]}", *(f"  {name}: {forms[name]}" for name in others)]
        return "\n".join([markdown(load("metrics").table(result["metrics"], others)), *lines])

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
        score: Score = "auto",
        device: Device = "auto",
    ):
        """Score recordings of a machine and decide which are anomalous.

        Exit status: 0 if everything was scored, 1 if files or windows were skipped, 2 for an error.

        Args:
            files: Sound files, folders, manifests (.csv), or - to read names from standard input.
            machine: Machine type of all files; by default from their folders and names (fan/id_00/...).
            id: Machine id of all files; recordings of an unknown id are scored against every id of the type.
            false_alarm_rate: Share of normal recordings that may be called anomalous.
            calibrate: More normal recordings to set thresholds, not trained on and as long as those to judge.
            window_step: Seconds between windows of a long recording; by default as in training.
            csv: Output file, one row per recording.
            json: Output file, with the scores over time of long recordings.
            plot: Picture of the most anomalous recording: scores over time and spectrogram.
            explain: Picture of its highest window: which frequencies and times raise the score.
            batch_size: Windows per batch.
            score: Anomaly score that decides; auto is that of the checkpoint's preset.
        """
        scorer, summary = load("inference.score").score(
            checkpoint, files, machine_type=machine, machine_id=id, rate=false_alarm_rate,
            calibrate_with=calibrate, step=window_step, batch_size=batch_size, channel=channel, csv_path=csv,
            json_path=json, plot_path=plot, explain_path=explain, device=device, form=score,
        )  # fmt: skip
        show(summary.text(scorer))
        sys.exit(bool(summary.skipped or summary.windows_not_scored))

    def metrics(
        scores: Positional[Path], out: Out | None = None, labels: Path | None = None, bootstrap: int = 1000
    ):
        """Compute AUC and pAUC from any folder of score files in the DCASE format.

        Args:
            scores: Folder with anomaly_score_TYPE_id_XX.csv or TYPE_anomaly_score_id_XX.csv.
            out: Folder for metrics.json and metrics.csv.
            labels: eval_data_list.csv, for file names without normal_ or anomaly_.
            bootstrap: Resamples for the 95 % intervals; 0 omits them.
        """
        folder(out)
        library = load("metrics")
        rows = library.read_scores(scores, labels)
        if remark := library.unmatched(rows, labels):
            print(remark, file=sys.stderr)
        result = library.evaluate_scores(library.measured(rows), bootstrap)
        if out is not None:
            library.write_metrics(result, out)
        return markdown(library.table(result))

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
    ):
        """Compare variants of the training, or analyse trained detectors.

        Finished runs are reused. A failed run does not stop the others; the exit status is then 1.

        Args:
            name: The first five compare trainings: parts of the method, input maps, schemes, number formats,
                filtered clips. The next five analyse detectors: test clips filtered, with mel bands replaced,
                or in noise; anomaly scores; embeddings. all omits precision.
            checkpoint: A detector to analyse; by default one per seed, trained if needed.
            seeds: Train every variant once per seed.
            variants: Only these variants, besides the baseline.
            jobs: Parallel trainings.
            cutoffs: Cut-off frequencies in Hz, for high-frequency and high-frequency-training.
        """
        options = {"seeds": seeds, "only": variants, "checkpoint": checkpoint, "cutoffs": cutoffs}
        run_experiment(name, data, out, config, jobs=jobs, device=device, **options)

    def report(run: Positional[Path], data: Data | None = None):
        """Write a run's report (HTML pages), figures (PNG, PDF) and tables (LaTeX) into the run's folder.

        Args:
            run: The folder of a trained and evaluated run.
            data: The run's data; by default RUN/data.
        """
        page, results = load("report.pages").write(run, data), load("report.results")
        return f"report: {page}\n{results.headline(run)}\n{results.expectation(run)}".strip()

    def bench(
        name: Positional[Literal["model", "train", "data", "score"]],
        out: Out = Path("results"),
        data: Data | None = None,
    ):
        """Measure the speed of the model, of training, of reading data or of scoring on this machine.

        Args:
            data: For the benchmarks that read data; by default simulated machines.
        """
        return load("bench").bench(name, out, data).read_text(encoding="utf-8").strip()

    functions = (synth, download, inspect, pack, train, evaluate, score, metrics, ablate, report, bench)
    return {function.__name__: function for function in functions}


def load(name: str) -> Any:
    """A module of this package, imported when a command runs: --help does not wait for PyTorch."""
    return import_module(f"osscl_min.{name}")


def show(text: object) -> None:
    """Print in the first process: the only one, or the first of torchrun's."""
    if os.environ.get("RANK", "0") == "0":
        print(text)


def folder(out: Path | None) -> None:
    """Refuse an output folder that is a file, before anything is computed."""
    if out is not None and out.exists() and not out.is_dir():
        raise UserError(f"{printable(out)} is a file; --out takes a folder")


def run_experiment(name: str, data: Path, out: Path, config: Config, **settings: Any) -> NoReturn:
    """Run an experiment, or all, and print the tables; exit status 1 where something failed."""
    folder(out)
    if not settings["seeds"]:
        raise UserError("--seeds takes at least one number")
    if "RANK" in os.environ:
        raise UserError("experiments train in processes of their own: start them without torchrun")
    variants = load("experiments.variants")
    if name == "all":
        results = variants.run_all(data, out, config, **settings)
    else:
        results = [(name, variants.run(name, data, out, config, **settings))]
    failures = []
    for each, result in results:
        if isinstance(result, UserError):
            failures.append(f"failed: {each}: {result}")
            continue
        stem = out / each.replace("-", "_")
        show(f"{stem.with_suffix('.md').read_text(encoding='utf-8')}\n{stem.with_suffix('.json')}")
        failures += [f"failed: {variant}: {reason}" for variant, reason in result["failed"].items()]
    for line in failures:
        print(line, file=sys.stderr)
    sys.exit(bool(failures))


def main() -> None:
    """Run one command; a user's error ends in one line and its exit status, mostly 2."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # any file name can be printed
            stream.reconfigure(errors="backslashreplace")
    if sys.argv[1:] == ["--version"]:
        return print(f"osscl-min {__version__}")
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--preset", choices=PRESETS, default="small")
    functions = commands(PRESETS[first.parse_known_args()[0].preset])
    try:
        show(tyro.extras.subcommand_cli_from_dict(functions, prog="osscl", description=__doc__))
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (UserError, OSError) as error:
        print(f"osscl: {error}", file=sys.stderr)
        sys.exit(getattr(error, "exit_status", 2))
