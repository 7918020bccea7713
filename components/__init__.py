"""KFP components, one a stage, and one for the operator: they translate artifacts and arguments, and hold no logic."""

from components.check_images import check_images
from components.evaluate import evaluate
from components.export import export
from components.fine_tune import fine_tune
from components.ingest import ingest
from components.train_distributed import train_distributed
from components.train_head import train_head

__all__ = ["check_images", "evaluate", "export", "fine_tune", "ingest", "train_distributed", "train_head"]
