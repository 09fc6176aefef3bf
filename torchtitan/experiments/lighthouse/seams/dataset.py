"""Upstream's packed dataset, made to resume exactly; it has no hook between its records and its position."""

import copy
from collections.abc import Iterator
from typing import Any

from datasets import IterableDataset
from torchtitan.experiments.lighthouse.errors import DataError
from torchtitan.hf_datasets.text_datasets import HuggingFaceTextDataset


class ResumableTextDataset(HuggingFaceTextDataset):
    """``HuggingFaceTextDataset`` that resumes exactly at any time and does not loop for ever over nothing."""

    _resumed_from: dict[str, Any] | None = None
    _previous_pass_was_empty = False

    def __iter__(self) -> Iterator[tuple[dict[str, Any], Any]]:
        self._own_epoch()
        return super().__iter__()

    def _get_data_iter(self) -> Iterator[dict[str, Any]]:
        """One pass over this reader's documents.

        Raises:
            DataError: if an endless dataset yields nothing in two passes running. (One empty pass is normal
                when a run resumes at the very end of an epoch.) Upstream would loop, and other ranks hang.
        """
        self._resumed_from = None
        empty = True
        for sample in super()._get_data_iter():
            empty = self._previous_pass_was_empty = False
            yield sample
        if empty and self._previous_pass_was_empty and self.infinite:
            raise DataError(
                f"dataset {self.dataset_name!r} has no document left for one of its readers: it needs a "
                "document for every data-parallel rank, and a file for every dataloader worker of a rank"
            )
        self._previous_pass_was_empty = empty

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._resumed_from = state_dict
        if "data" in state_dict:
            self._own_epoch()
            # `datasets` ignores a state of another epoch than the dataset's own, which starts at 0.
            self._data.set_epoch(state_dict["data"]["epoch"])

    def state_dict(self) -> dict[str, Any]:
        # `datasets` reports the loaded position only once it has been asked for a record.
        state = self._resumed_from or super().state_dict()
        # A worker's state is pickled by another thread, while this one goes on extending the buffer.
        return {**state, "token_buffer": list(state["token_buffer"])}

    def _own_epoch(self) -> None:
        # `datasets` keeps the epoch number in memory that all workers share, though each of them counts its
        # own epochs. A deep copy has a number of its own.
        if isinstance(self._data, IterableDataset):
            self._data = copy.deepcopy(self._data)
