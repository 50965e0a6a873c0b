"""OS-SCL anomalous sound detection. Every command has its own --help."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

import tyro

from osscl_min.config import PRESETS, AudioConfig, Config, EvaluateConfig
from osscl_min.data.synth import SynthConfig
from osscl_min.runtime.files import UserError

Positional = tyro.conf.Positional
Preset = Literal["paper", "small", "quick"]
Experiment = Literal["components", "inputs", "training", "precision", "high-frequency-training",
                     "high-frequency", "bands", "noise", "scores", "embeddings", "all"]  # fmt: skip
Device = Annotated[str, tyro.conf.arg(metavar="auto|cpu|cuda|cuda:N")]


def commands(preset: Config) -> dict[str, Callable]:
    """Every command as a function; what they import is loaded only when they run.

    Parameters
    ----------
    preset : Config
        Gives the defaults of every setting.
    """

    def synth(
        out: Positional[Path],
        config: Annotated[SynthConfig, tyro.conf.arg(name="")] = SynthConfig(),
    ) -> None:
        """Write simulated machines as a data folder in the DCASE 2020 layout.

        Args:
            out: The new folder.
            config: What to simulate.
        """
        from osscl_min.data.synth import write_dataset

        print(write_dataset(out, config))

    def download(
        directory: Positional[Path],
        parts: str = "dev,eval-train,eval-test,labels",
        types: str = "fan,pump,slider,ToyCar,ToyConveyor,valve",
        jobs: int = 2,
        mirror: str = "",
        trust_mirror: bool = False,
    ) -> None:
        """Fetch the DCASE 2020 Task 2 data, or what is missing of it; a download that was cut short goes on.

        Exit status of an error: 3 network or server, 4 wrong checksum, 5 full disk, 6 corrupt zip,
        7 a folder that cannot be written.

        Args:
            directory: The data folder.
            parts: Which parts, with commas between them.
            types: Which machine types, with commas between them.
            jobs: Files at a time.
            mirror: Address of a copy that answers like https://zenodo.org.
            trust_mirror: Take its checksums instead of the published ones.
        """
        from osscl_min.data.download import download as run

        chosen = {"parts": parts.split(","), "types": types.split(",")}
        print(run(directory, **chosen, jobs=jobs, mirror=mirror, trust_mirror=trust_mirror))

    def inspect(data: Positional[Path], out: Path | None = None) -> None:
        """Show what a data set holds: counts, lengths, rates, levels, doubles, conflicts.

        Args:
            data: Data folder, manifest or packed store.
            out: Folder for inspect.json, inspect.csv and inspect.png.
        """
        from osscl_min.data import inspection
        from osscl_min.report import figures
        from osscl_min.runtime.tables import markdown

        result = inspection.inspect(data)
        print(f"{markdown(inspection.table(result))}\n{inspection.remarks(result)}".strip())
        if out is not None:
            inspection.write(result, out)
            from osscl_min.runtime.plotting import save

            save(figures.inventory(result), out / "inspect.png")

    def pack(
        data: Positional[Path],
        store: Positional[Path],
        verify: bool = False,
        jobs: int | None = None,
        channel: int | None = None,
        sample_rate: int = preset.model.audio.sample_rate,
        seconds: float = preset.model.audio.seconds,
        preset: Preset = preset.preset,
    ) -> None:
        """Decode every clip once, into a packed store that train and evaluate take in place of the data.

        Run it again after an interruption, or when files were changed, added or removed.

        Args:
            data: Data folder or manifest.
            store: The store's folder.
            verify: Compare every file and every packed clip by its hash.
            jobs: Threads; all cores by default.
            channel: Of files with several; without, 0 for MIMII and else their mean.
            sample_rate: Of the packed clips, Hz.
            seconds: Length of the packed clips.
            preset: Chooses the defaults of the rate and the length.
        """
        from osscl_min.data.store import pack as run

        audio = AudioConfig(sample_rate, seconds, f_max=min(AudioConfig.f_max, sample_rate / 2))
        print(run(data, store, audio, channel=channel, verify=verify, jobs=jobs))

    def train(
        data: Path,
        out: Path,
        config: Annotated[Config, tyro.conf.arg(name="")] = preset,
        others: Annotated[str | None, tyro.conf.arg(name="with", metavar="DIR|simulated")] = None,
        device: Device = "auto",
        strict: bool = False,
        resume: bool = False,
        seeds: Annotated[str, tyro.conf.arg(metavar="0,1,2")] = "",
    ) -> None:
        """Train a detector on the normal clips of a data folder; a run that was cut short goes on.

        Args:
            data: Data folder (TYPE/train/normal_id_00_00000000.wav), manifest or packed store.
            out: The run's folder.
            config: Settings; --preset chooses their defaults.
            others: Data folder of other machines to tell yours from, needed where there is only one.
            device: Where to compute.
            strict: Stop if any file cannot be used.
            resume: Stop where there is no run to go on with.
            seeds: Train and evaluate once for each of these, into OUT/runs, and average.
        """
        from osscl_min.train import train as run

        if seeds:
            if not all(seed.strip().isdecimal() for seed in seeds.split(",")):
                raise UserError(f"--seeds takes whole numbers with commas between them, not {seeds!r}")
            if others or strict or resume or "RANK" in os.environ:
                raise UserError("--seeds does without --with, --strict, --resume and torchrun")
            numbers = [int(seed) for seed in seeds.split(",")]
            run_experiment("seeds", data, out, config, seeds=numbers, device=device)
        where = {"device": device, "strict": strict, "resume": resume}
        best = run(data, out, config, others=others, **where)
        if prints():
            print(best)

    def evaluate(
        checkpoint: Path,
        data: Path,
        out: Path,
        config: Annotated[EvaluateConfig, tyro.conf.arg(name="")] = preset.evaluate,
        preset: Preset = preset.preset,
        device: Device = "auto",
        strict: bool = False,
    ) -> None:
        """Score the test clips of a data folder and write the tables.

        Args:
            checkpoint: A run's best.pt, or a .pth file of the authors'.
            data: Data folder (TYPE/test/...), manifest or packed store.
            out: Folder for the scores and tables.
            config: Batch size and bootstrap.
            preset: Chooses the defaults of the settings.
            device: Where to compute.
            strict: Stop if any file cannot be used.
        """
        from osscl_min.evaluate import evaluate as run
        from osscl_min.metrics import table
        from osscl_min.runtime.tables import markdown

        result = run(checkpoint, data, out, config=config, device=device, strict=strict)
        if not prints():
            return
        if result["metrics"] is None:
            print(f"scored {result['clips']} clips, none with a known truth: {out / 'scores.csv'}")
        else:
            print(markdown(table(result["metrics"])))

    def score(
        checkpoint: Positional[Path],
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
        channel: int | None = None,
        device: Device = "auto",
    ) -> None:
        """Score recordings of a machine and say which are anomalous.

        Exit status: 0 if everything was scored, 1 if files or windows were not (they are listed), 2 for an
        error.

        Args:
            checkpoint: A run's best.pt.
            files: Sound files, folders of them, manifests (.csv), or - for names on standard input.
            machine: Machine type of all files; left out, their folders and names say it (fan/id_00/...).
            id: Machine id of all files; one that was never trained on is scored against every id of its type.
            false_alarm_rate: Share of normal recordings that may be called anomalous.
            calibrate: More normal recordings, never trained on, to set the thresholds by: files or folders.
                Each counts once; for long recordings, give ones that are as long.
            window_step: Seconds between the windows of a long recording; half a window if left out.
            csv: File for the results, a row a file.
            json: File for the results, with the time lines of long recordings.
            plot: Picture (.png, .pdf, .svg) of the strangest recording: scores over time and spectrogram.
            explain: Picture of its highest window: which frequencies and times raised the score.
            batch_size: Windows at once.
            channel: The channel to take of files with several.
            device: Where to compute.
        """
        from osscl_min.inference.score import score as run

        scorer, summary = run(
            checkpoint, files, machine_type=machine, machine_id=id, rate=false_alarm_rate,
            calibrate_with=calibrate, step=window_step, batch_size=batch_size, channel=channel, csv_path=csv,
            json_path=json, plot_path=plot, explain_path=explain, device=device,
        )  # fmt: skip
        if prints():
            print(summary.text(scorer))
        if summary.skipped or summary.windows_not_scored:
            sys.exit(1)

    def metrics(
        scores: Positional[Path],
        out: Path | None = None,
        labels: Path | None = None,
        bootstrap: int = 1000,
    ) -> None:
        """Tables from any folder of DCASE-format score files, this package's or another's.

        Args:
            scores: Folder with anomaly_score_TYPE_id_XX.csv or TYPE_anomaly_score_id_XX.csv.
            out: Folder for metrics.json and metrics.csv.
            labels: eval_data_list.csv, for files whose names do not tell the truth.
            bootstrap: Resamples for the 95 % intervals; 0 leaves them out.
        """
        from osscl_min.metrics import evaluate_scores, read_scores, table, unmatched, write_metrics
        from osscl_min.runtime.tables import markdown

        rows = read_scores(scores, labels)
        if remark := unmatched(rows, labels):
            print(remark, file=sys.stderr)
        result = evaluate_scores(rows, bootstrap)
        if out is not None:
            write_metrics(result, out)
        print(markdown(table(result)))

    def ablate(
        name: Positional[Experiment],
        data: Path,
        out: Path,
        checkpoint: Path | None = None,
        seeds: tuple[int, ...] = (preset.train.seed,),
        variants: tuple[str, ...] = (),
        jobs: int = 1,
        cutoffs: tuple[float, ...] | None = None,
        config: Annotated[Config, tyro.conf.arg(name="")] = preset,
        device: Device = "auto",
    ) -> None:
        """Run an experiment: train its variants and compare them, or examine trained detectors more closely.

        Finished runs are reused; a failure does not stop the others, and the exit status is then 1.

        Args:
            name: The first five compare trainings, the others examine detectors; all runs one after the other
                (without precision).
            data: Data folder.
            out: Folder for the runs and the result.
            checkpoint: A run's best.pt to examine; without it, the seeds' detectors, trained where missing.
            seeds: A run of every variant for each.
            variants: Only these, beside the baseline.
            jobs: Runs at a time.
            cutoffs: Cut-off frequencies in Hz, for high-frequency and high-frequency-training.
            config: Settings; --preset chooses their defaults.
            device: Where to compute.
        """
        run_experiment(
            name, data, out, config, seeds=seeds, only=variants, checkpoint=checkpoint, cutoffs=cutoffs,
            device=device, jobs=jobs,
        )  # fmt: skip

    def report(run: Positional[Path], data: Path | None = None) -> None:
        """Draw a run's figures, write its report, one HTML page, and its tables in LaTeX (RUN/paper).

        Args:
            run: The run's folder.
            data: Its data folder; without it, the clips' own pictures are left out.
        """
        from osscl_min.report import figures, paper
        from osscl_min.report import pages as page
        from osscl_min.runtime.tables import markdown

        figures.write_all(run, data)
        written = page.write(run)
        print(f"report: {written}")
        if page.is_measured(run):
            print(f"tables for a paper: {paper.write(run)[0].parent}")
            print(markdown(page.results_table(run)))

    def keep(run: Positional[Path], folder: Positional[Path], tests: Path | None = None) -> None:
        """Copy a run's measured tables into a folder of results/.

        Args:
            run: A run of reproduce.sh.
            folder: Such as results/quick.
            tests: timing.csv of `reproduce.sh --test`.
        """
        from osscl_min.report.update import keep as run_keep

        run_keep(run, folder, tests)

    def readme() -> None:
        """Write the tables of results/ into README.md and kernels/README.md."""
        from osscl_min.report.update import write_documents

        for document in write_documents():
            print(document)

    def bench(
        name: Positional[Literal["model", "train", "data", "score"]],
        out: Path = Path("results"),
        data: Path | None = None,
    ) -> None:
        """Measure how fast the model, training, the reading of data or scoring is on this machine.

        Args:
            name: What to measure.
            out: Folder for the table, as CSV and as Markdown.
            data: Data folder, for what reads one; without it, simulated machines are made.
        """
        from osscl_min.bench import bench as run

        print(run(name, out, data).read_text(encoding="utf-8"), end="")

    functions = (
        synth, download, inspect, pack, train, evaluate, score, metrics, ablate, report, keep, readme, bench,
    )  # fmt: skip
    return {function.__name__: function for function in functions}


def prints() -> bool:
    """Whether this process tells the result: of torchrun's, the first."""
    return os.environ.get("RANK", "0") == "0"


def run_experiment(name: str, data: Path, out: Path, config: Config, **settings: Any) -> NoReturn:
    """Run an experiment, or all, and print its table; exit status 1 where a run failed."""
    from osscl_min.experiments.variants import run, run_all

    failed = False
    runs = run_all(data, out, config, **settings) if name == "all" else [(name, None)]
    for each, result in runs:
        result = result or run(each, data, out, config, **settings)
        failed |= isinstance(result, UserError)
        if isinstance(result, UserError):
            print(f"failed: {each}: {result}", file=sys.stderr)
            continue
        stem = out / each.replace("-", "_")
        print(f"{stem.with_suffix('.md').read_text(encoding='utf-8')}\n{stem.with_suffix('.json')}")
        for variant, line in result["failed"].items():
            failed = True
            print(f"failed: {variant}: {line}", file=sys.stderr)
    sys.exit(failed)


def main() -> None:
    """Run one command; a user's error ends in one line and its exit status, mostly 2."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--preset", choices=PRESETS, default="small")
    try:
        preset = PRESETS[first.parse_known_args()[0].preset]
        tyro.extras.subcommand_cli_from_dict(commands(preset), prog="osscl", description=__doc__)
    except UserError as error:
        print(f"osscl: {error}", file=sys.stderr)
        sys.exit(error.exit_status)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
