"""NEFTune: uniform noise on the embeddings of a row, while training and never else (arXiv 2310.05914)."""

from typing import Any


class EmbeddingNoise:
    """Draws from torch's generator, whose state stands in every checkpoint.

    The noise of a token is ±alpha/√(tokens of its row · width), whether its row is packed with others, padded or
    alone. transformers' own hook takes the length of the padded or packed sequence for that of the row.
    """

    def __init__(self, model: Any, alpha: float):
        self.alpha = alpha
        self._lengths: Any = None
        self._embedding = model.get_input_embeddings()
        self._embedding.register_forward_hook(self._add)

    def expect(self, inputs: dict[str, Any]) -> None:
        """The batch that comes next."""
        self._lengths = row_lengths(inputs)

    def _add(self, embedding: Any, inputs: Any, output: Any) -> Any:
        import torch

        if not embedding.training:
            return output
        size = self.alpha / (self._lengths.unsqueeze(-1) * output.shape[-1]).sqrt()
        return output + (torch.rand_like(output) * 2 - 1) * size.to(output.dtype)


def row_lengths(inputs: dict[str, Any]) -> Any:
    """Of each token (B, T), how many tokens its row has, as floats."""
    import torch

    ids, positions, mask = inputs["input_ids"], inputs.get("position_ids"), inputs.get("attention_mask")
    if positions is not None:
        rows = (positions == 0).cumsum(dim=1)
        counts = torch.zeros(ids.shape[0], ids.shape[1] + 1, device=ids.device)
        counts.scatter_add_(1, rows, torch.ones_like(rows, dtype=counts.dtype))
        return counts.gather(1, rows)
    counted = torch.ones_like(ids) if mask is None else mask
    return counted.sum(dim=1, keepdim=True).float().expand(ids.shape)
