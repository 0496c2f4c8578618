"""What a context-parallel rank has of a micro-batch's rows, and which response tokens it predicts.

Shapes as in `micro_batches`: b rows of s tokens, b responses of R tokens; a packed row is one of t = s tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_longact.tokens import zigzag_positions


@dataclass(frozen=True)
class RowPart:
    """A rank's part of each row, and n - 1 response tokens that it predicts.

    places: int64 [s / cp], where the tokens stand in the row; predicting: int64 [n], where in its flattened
    [s / cp, b] hidden states those stand that predict; predicted: int64 [n], which of the flattened [b, R] tokens they
    predict. The last of the n is of no response, b R: so a rank without any still takes part in all that ranks do.
    """

    places: Tensor
    predicting: Tensor
    predicted: Tensor

    def cuda(self) -> RowPart:
        """A copy on this process's device."""
        return RowPart(self.places.cuda(), self.predicting.cuda(), self.predicted.cuda())


def row_part(
    positions: Tensor, response_mask: Tensor, *, bounds: Tensor, num_rows: int, cp_rank: int, cp_size: int
) -> RowPart:
    """The part of a rank in rows whose sequences are cut in zigzag.

    positions: int64 [b, R], where in the flattened [s, rows] each response token is predicted; response_mask: bool
    [b, R]; bounds: of a row's sequences, the last of which is s; num_rows: 1 of a packed row.
    """
    length = int(bounds[-1])
    places = zigzag_positions(bounds, length, cp_rank=cp_rank, cp_size=cp_size)
    local = torch.full((length,), -1)
    local[places] = torch.arange(len(places))
    place = local[positions // num_rows]  # [b, R]
    here = (response_mask & (place >= 0)).flatten()
    predicting = (place * num_rows + positions % num_rows).flatten()[here]
    predicted = here.nonzero().flatten()
    nothing = torch.tensor([0]), torch.tensor([positions.numel()])
    return RowPart(places, torch.cat([predicting, nothing[0]]), torch.cat([predicted, nothing[1]]))
