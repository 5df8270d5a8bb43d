"""Pipeline parallelism: a model's layers divided over ranks, by torch's schedules."""

from colrow.parallel.pipeline.make import pipeline_parallel
from colrow.parallel.pipeline.pipeline import Pipeline, PipelineOutput, PipelineReport

__all__ = ["Pipeline", "PipelineOutput", "PipelineReport", "pipeline_parallel"]
