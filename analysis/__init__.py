"""Analyses of trained models: measurements, their records, figures and reports, and the command `curvature`.

    run = analysis.inspect(objective, generator=0)        # the record that `curvature inspect` makes of a task
    run.inspection.sharpness                              # a number with its errors
    run.save("runs/mine")                                 # the command's folder, with the same page
    analysis.measure("noise", objective, generator=0)     # likewise every other study
    analysis.load_run("runs/mine")                        # bit for bit, without the model

Names are imported when they are asked for.
"""

from __future__ import annotations

import importlib
from typing import Any

_PLACES = {
    "registry": "inspect load_run measure",
    "alignment.class_structure": "class_structure",
    "alignment.figures": "plot_alignment plot_class_structure plot_overlaps",
    "alignment.measure": "gradient_alignment overlap_over_time subspace_overlap",
    "alignment.results": "ClassStructure GradientAlignment SubspaceOverlap VectorAlignment",
    "compare.figures": "plot_comparison",
    "compare.measure": "compare_results",
    "compare.results": "Compared Comparison",
    "compare.study": "ComparisonRun compare_runs",
    "conditioning.figures": "plot_conditioning plot_effective_dimension",
    "conditioning.measure": "ConditioningPlan compare_conditioning measure_conditioning",
    "conditioning.results": "Condition Conditioning ConditioningComparison",
    "conditioning.study": "ConditioningRun",
    "critical.figures": "plot_escape",
    "critical.measure": "CriticalPlan critical_points",
    "critical.results": "CriticalPoint EscapeLine Symmetry",
    "critical.study": "CriticalRun",
    "critical.symmetries": "rescaling_symmetries",
    "generalization.complexity.figures": "plot_model_complexity",
    "generalization.complexity.measure": "ComplexityPlan effective_model_complexity",
    "generalization.complexity.results": "EffectiveModelComplexity",
    "generalization.complexity.study": "ComplexityRun",
    "generalization.contrast.figures": "plot_contrast_ratios plot_fitting",
    "generalization.contrast.labels": "RandomLabelsPlan RandomLabelsRun random_labels",
    "generalization.contrast.regularization": "RegularizationPlan RegularizationRun regularization_by_curvature",
    "generalization.contrast.results": "ContrastRow Contrasts",
    "generalization.descent.figures": "plot_descent plot_descent_curvature",
    "generalization.descent.measure": "DescentPlan double_descent",
    "generalization.descent.random_features": "least_squares_risk",
    "generalization.descent.results": "DescentCurve DescentRow",
    "generalization.descent.study": "DescentRun",
    "generalization.dimension.figures": "plot_dimension_of",
    "generalization.dimension.measure": "EffectiveDimensionPlan effective_dimension",
    "generalization.dimension.results": "EffectiveDimension MatrixDimension",
    "generalization.dimension.study": "EffectiveDimensionRun",
    "generalization.implicit_bias.deep_linear": "deep_linear_singular_values singular_value_rates train_deep_linear",
    "generalization.implicit_bias.diagonal_linear": "diagonal_linear_flow least_norm least_q q_potential",
    "generalization.implicit_bias.figures": "plot_completion plot_deep_linear plot_diagonal_linear plot_label_noise",
    "generalization.implicit_bias.label_noise": "label_noise_descent",
    "generalization.implicit_bias.measure": "ImplicitBiasPlan implicit_bias",
    "generalization.implicit_bias.results": "DeepLinearRun DiagonalRun ImplicitBias LabelNoiseRun",
    "generalization.implicit_bias.study": "ImplicitBiasRun",
    "generalization.pruning.figures": "plot_layer_pruning plot_pruning plot_pruning_predictions plot_tickets",
    "generalization.pruning.masks": "dense_model masks_of sparse_model",
    "generalization.pruning.measure": "PruningPlan measure_pruning",
    "generalization.pruning.removal": "LossChanges loss_changes",
    "generalization.pruning.results": "PruningPoint PruningRecord TicketRow Tickets",
    "generalization.pruning.scores": "PruningScores pruning_scores",
    "generalization.pruning.study": "PruningRun",
    "generalization.pruning.tickets": "lottery_tickets",
    "implicit.backward_error": "backward_error",
    "implicit.figures": "plot_backward_error plot_penalties plot_penalty_by_batch_size",
    "implicit.measure": "ImplicitPlan adam_correction implicit_regularization penalty_gradients",
    "implicit.results": "BackwardError ImplicitRegularization PenaltyDirection",
    "implicit.study": "ImplicitRun",
    "inspection.coupling": "layer_coupling",
    "inspection.diagonal": "layer_diagonals",
    "inspection.figures": "plot_eigenvalues plot_layers plot_spectral_density",
    "inspection.low_rank": "low_rank_error",
    "inspection.figures_layers": "plot_layer_coupling plot_layer_diagonals",
    "inspection.measure": "inspect_model",
    "inspection.figures_low_rank": "plot_low_rank_error",
    "inspection.plan": "InspectionPlan",
    "inspection.results": "DataErrors Inspection LayerCoupling LayerCurvature LayerDiagonals LowRankError",
    "inspection.study": "InspectionRun",
    "integrations.hugging_face": "accumulate_in hugging_face_callback",
    "integrations.lightning": "lightning_callback",
    "integrations.loggers": "csv_logger tensorboard_logger wandb_logger",
    "landscape.directions": "custom_direction direction_to eigenvector_directions gradient_direction random_direction "
    "trajectory_directions",
    "landscape.figures": "plot_paths plot_plane plot_slice plot_surface",
    "landscape.look": "look_around",
    "landscape.measure": "loss_along loss_on_plane",
    "landscape.paths": "Place bend_towards loss_along_path present_place read_place",
    "landscape.plan": "LandscapePlan",
    "landscape.results": "Direction Landscape LossPath LossPlane LossSlice Trajectory",
    "landscape.study": "LandscapeRun",
    "learning_rate.figures": "plot_learning_rates plot_threshold",
    "learning_rate.measure": "LearningRatePlan critical_learning_rate",
    "learning_rate.results": "Branch Estimate LearningRateRange ThresholdPoint WarmUp",
    "learning_rate.study": "LearningRateRun",
    "noise.curvature": "curvature_noise tail_index",
    "noise.figures": "plot_batch_sizes plot_layer_noise",
    "noise.measure": "gradient_noise noise_scale_from_two_sizes",
    "noise.results": "CurvatureNoise GradientNoise NoiseScale",
    "noise.study": "NoisePlan NoiseRun NoiseStudy measure_noise",
    "race.decide": "race_pairs",
    "race.figures": "plot_race plot_race_ends plot_race_pairs plot_race_rates plot_race_single",
    "race.measure": "race_optimizers",
    "race.plan": "RacePlan",
    "race.results": "Course CoursePoint Entrant Race RacePair Trait",
    "race.study": "RaceRun",
    "records.measured": "Bounded Measured",
    "sharpness.figures": "plot_sharpness",
    "sharpness.measure": "SHARPNESS_MEASURES SharpnessPlan measure_sharpness",
    "sharpness.results": "SharpnessRow SharpnessTable",
    "sharpness.study": "SharpnessRun",
    "tasks": "Task load_task",
    "training.critical_sharpness": "critical_sharpness",
    "training.depth": "layer_jacobians",
    "training.edge": "edge_of_stability",
    "training.figures": "plot_layer_sharpness plot_predictions plot_stability plot_training",
    "training.figures_spectrum": "plot_depth plot_smoothness plot_waterfall",
    "training.gradient_penalty": "GradientPenalty",
    "training.measure": "TrackPlan track_training",
    "training.results": "CriticalSharpness CriticalStatus EdgeOfStability GradientSmoothness LossSpike Phase "
    "TrainingReading TrainingRecord",
    "training.rows": "load_training",
    "training.smoothness": "gradient_smoothness",
    "training.spikes": "loss_spikes",
    "training.study": "TrackRun",
    "training.tracker": "CurvatureTracker",
}
_HOME = {name: place for place, names in _PLACES.items() for name in names.split()}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'analysis' has no attribute {name!r}")
    return getattr(importlib.import_module(f"analysis.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
