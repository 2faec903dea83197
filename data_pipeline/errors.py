"""The exceptions a user of the data pipeline can meet. The message of each names what happened,
where, and what to do next. `outcome` names a kind of end that has an exit
code of its own (model_factory/command_line/command.py).
"""


class DataPipelineError(ValueError):
    """Base of everything below: a problem with the user's input, never with our own logic."""


class RejectedInput(DataPipelineError):
    """One input file the packer cannot use. `reason` is a short code that is counted,
    `detail` a sentence.
    """

    def __init__(self, reason: str, detail: str):
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


class CorruptShard(DataPipelineError):
    """Bytes on disk that do not match the manifest that binds them."""


class MissingData(DataPipelineError):
    """A manifest, shard, label or centroid file that is not where it should be."""


class MissingLibrary(DataPipelineError):
    """An optional library that this command needs; the message has the line that installs it."""


class BudgetExceeded(DataPipelineError):
    """More bad samples than the error budget allows; the message lists them."""

    outcome = "data budget"


class DataTimeout(DataPipelineError):
    """No batch within the time-out; the message says what the loader was doing, and where."""

    outcome = "storage"
