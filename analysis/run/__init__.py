"""From a task to a complete run folder: preparation, studies, storage and reports."""
