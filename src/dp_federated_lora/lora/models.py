"""Pretrained backbones from local files, and the classification head on top."""

from __future__ import annotations

import logging
from contextlib import nullcontext, redirect_stderr
from enum import Enum
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from typing import Any, Final, Literal

import torch
from torch import Tensor, nn

from dp_federated_lora.errors import ModelError

Pooling = Literal["mean", "last"]
Quantization = Literal["4bit", "8bit"]

_CPU: Final = torch.device("cpu")


class Task(Enum):
    """What is learnt: a class of a text or image, the next token, or the next token of a text after its image."""

    CLASSIFICATION = "classification"
    CAUSAL_LM = "causal-lm"
    IMAGE_TEXT = "image-text"

    @property
    def loader(self) -> str:
        """The transformers class that loads such a model."""
        kinds = {Task.CAUSAL_LM: "AutoModelForCausalLM", Task.IMAGE_TEXT: "AutoModelForImageTextToText"}
        return kinds.get(self, "AutoModel")


def compute_device(wish: Literal["cpu", "cuda"] | None) -> torch.device:
    """Where models compute: without a wish on the GPU where torch sees one.

    Raises:
        ModelError: if a GPU is wished for and torch sees none.
    """
    if wish == "cuda" and not torch.cuda.is_available():
        raise ModelError(
            f'[run] device = "cuda": torch {torch.__version__} sees no GPU here; install a CUDA build of torch and the driver, '
            "or leave it out"
        )
    return torch.device("cuda" if wish != "cpu" and torch.cuda.is_available() else "cpu")


def native_dtype() -> Literal["float32", "bfloat16"]:
    """The frozen weights' fastest type here: bfloat16 where GPU or CPU (AMX, AVX-512) multiplies it natively, else float32."""
    if torch.cuda.is_available():
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    capabilities = torch.cpu.get_capabilities()
    return "bfloat16" if capabilities.get("amx_bf16") or capabilities.get("avx512_bf16") else "float32"


def preload() -> None:
    """Import what models of every task need, which takes seconds: for a program that stands by and will have none to lose."""
    import transformers  # noqa: PLC0415

    for task in Task:
        getattr(transformers, task.loader)


def load_backbone(
    path: Path,
    task: Task,
    *,
    dtype: torch.dtype = torch.float32,
    quantization: Quantization | None = None,
    device: torch.device = _CPU,
) -> nn.Module:
    """Load a transformers model from a directory or a `.gguf` file, frozen and without dropout.

    Args:
        path: the model directory or file.
        task: classification takes the bare encoder or decoder, language modelling the one with its output layer.
        dtype: of the frozen weights. Adapter, head, clipping and noise are float32 or finer whatever it is.
        quantization: of the frozen linear layers, which then compute in `dtype` (8bit: float16); the others keep `dtype`.
        device: where the model computes.

    Raises:
        ModelError: if transformers cannot read it, or bitsandbytes cannot quantise it here.
    """
    import transformers  # noqa: PLC0415  (seconds to import; only runs need it)
    from transformers.utils import logging as its_logging  # noqa: PLC0415

    quieten: Any = its_logging.disable_progress_bar
    quieten()  # the run has a progress display of its own

    kind: Any = getattr(transformers, task.loader)
    gguf = path.suffix == ".gguf"
    folder, options = path, {}
    if gguf:
        # Packed weights, which transformers would keep where kernels for them are installed, cannot be adapted.
        unpacked: Any = transformers.GgufConfig
        folder, options = path.parent, {"gguf_file": path.name, "quantization_config": unpacked(dequantize=True)}
    if quantization is not None:
        if gguf:
            raise ModelError(f"[model] quantization: {path} is quantised already; remove it, or give a transformers directory")
        options = _quantised(quantization, dtype, device)
    # Reading GGUF draws a bar of its own that no setting turns off.
    quiet = redirect_stderr(StringIO()) if gguf else nullcontext()
    try:
        with quiet:
            model: nn.Module = kind.from_pretrained(
                folder, dtype=dtype, attn_implementation="eager", local_files_only=True, **options
            )
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
        raise ModelError(
            f"[model] source: {path} is not a model that transformers can load for task {task.value!r}: {error}"
        ) from error
    for layer in model.modules():
        # bitsandbytes' packed 4-bit weights are for inference, and for layers in multiples of 64.
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            layer.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
    if quantization is None:  # quantised layers are loaded where they compute
        model.to(device)
    # eval() stays on during training: dropout would make the cached trunk wrong and DP runs do not need it.
    return model.eval().requires_grad_(False)


def _quantised(quantization: Quantization, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """Options that quantise while loading; 4bit is that of QLoRA (Dettmers et al. 2023, arXiv 2305.14314)."""
    if missing := [name for name in ("bitsandbytes", "accelerate") if find_spec(name) is None]:
        raise ModelError(
            f'[model] quantization = "{quantization}" needs {" and ".join(missing)}: pip install '
            "'dp-federated-lora-lab[quantized]', or remove it"
        )
    from transformers import BitsAndBytesConfig  # noqa: PLC0415

    kind: Any = BitsAndBytesConfig
    if quantization == "8bit":
        # It says so for every layer and every call.
        logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
        config = kind(load_in_8bit=True)
    else:
        config = kind(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype)
    return {"quantization_config": config, "device_map": {"": device.type}}


class Classifier(nn.Module):
    """Backbone of texts or images -> pooled, L2-normalised features -> linear head.

    Pooling follows the pretraining (mask mean for encoders, last token for decoders); normalised features bound the
    head's gradient, so that one clip norm fits every example; the head starts at zero, so that no class is favoured.

    Args:
        backbone: module with `config.hidden_size` whose output has `last_hidden_state`.
        classes: number of classes.
        pooling: "mean" or "last".
    """

    def __init__(self, backbone: nn.Module, classes: int, pooling: Pooling) -> None:
        super().__init__()
        self.backbone = backbone
        self.pooling = pooling
        hidden: Any = backbone.config
        self.head = nn.Linear(int(hidden.hidden_size), classes, device=next(backbone.parameters()).device)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def features(self, input_ids: Tensor, attention_mask: Tensor, pixel_values: Tensor | None = None) -> Tensor:
        """Pooled features `(B, h)` of length 1; those of an image replace its placeholders among `input_ids`."""
        if pixel_values is None:
            states: Tensor = self.backbone(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        else:
            states = self.backbone(pixel_values=pixel_values).last_hidden_state
        states = states.to(self.head.weight.dtype)  # frozen weights may be coarser than the head
        if self.pooling == "last":
            pooled = states[torch.arange(len(states), device=states.device), attention_mask.sum(dim=1) - 1]
        else:
            mask = attention_mask[..., None].to(states.dtype)
            pooled = (states * mask).sum(dim=1) / mask.sum(dim=1)
        return nn.functional.normalize(pooled, dim=1)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, pixel_values: Tensor | None = None) -> Tensor:
        """Logits `(B, classes)` of token ids and mask `(B, T)`, or of pixels `(B, channels, height, width)`."""
        logits: Tensor = self.head(self.features(input_ids, attention_mask, pixel_values))
        return logits
