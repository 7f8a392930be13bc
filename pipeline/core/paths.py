"""Where a workspace keeps artifacts and results, relative to its root. dvc.yaml and this module name the same paths."""

from pathlib import Path

QUERIES_DIR = Path("data/queries")
RESPONSES_DIR = Path("data/responses")
TARGETS_DIR = Path("data/targets")
TEACHER_DIR = Path("models/teacher")
ENCODER_DIR = Path("models/encoder")
# Stage -> its artifact, in the order of the pipeline.
STAGE_ARTIFACTS = {
    "collect": QUERIES_DIR,
    "generate": RESPONSES_DIR,
    "teach": TEACHER_DIR,
    "embed": TARGETS_DIR,
    "train": ENCODER_DIR,
}

RESULTS_DIR = Path("results")
EVALUATE_DIR = RESULTS_DIR / "evaluate"
PROBE_DIR = RESULTS_DIR / "probe"
# Figures while a stage runs, by stage.
LIVE_DIR = RESULTS_DIR / "live"
LOSS_CURVE = RESULTS_DIR / "train/loss.csv"
HELDOUT_CURVE = RESULTS_DIR / "train/heldout.csv"
REPORT_PAGES = (RESULTS_DIR / "report.html", RESULTS_DIR / "report.md")

# Tables of the queries.
TRAIN_TABLE, HELDOUT_TABLE = "train.parquet", "heldout.parquet"
# Tables of a suite and of a probe.
SUMMARY_TABLE, ROWS_TABLE, DELTAS_TABLE = "summary.parquet", "rows.parquet", "deltas.parquet"
