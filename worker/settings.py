"""What the GPU edge needs to know, read from `ZIMAGE_*` variables."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, HttpUrl, SecretStr, StringConstraints
from pydantic_settings import BaseSettings

from storage.settings import MODEL_CONFIG, load

Size = Annotated[str, StringConstraints(pattern=r"^[1-9][0-9]{1,3}x[1-9][0-9]{1,3}$")]
"""Width x height in pixels."""


class WorkerSettings(BaseSettings):
    """Where and how the model draws, what it refuses, and what is written into its images."""

    model_config = MODEL_CONFIG

    # --- Where ---
    device: str = "auto"
    """`auto` takes CUDA, else MPS, else the CPU; `all` is a process for every GPU; or names that
    torch knows, with commas between them for a process each."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """`auto` is bfloat16 on a GPU and float32 on a CPU."""

    # --- How fast, and in how much memory ---
    attention_backend: str = "native"
    """By diffusers' name: `native` is torch's own; `flash`, `_flash_3`, `sage` need a package."""
    compile: bool = False
    """Compile the transformer's repeated blocks; each new size is then slow once."""
    quantization: Literal["none", "int8", "float8"] = "none"
    """Of the transformer's large layers, by torchao; the sensitive ones keep their precision."""
    vae_channels_last: bool = False
    """Keep the VAE's numbers channels-last in memory."""
    offload: Literal["none", "model", "sequential"] = "none"
    """Keep in the GPU's memory only the model that is at work, or only its layer."""
    warmup_sizes: list[Size] | None = None
    """Drawn before the first task, as JSON. None: 1024x1024 on a GPU, nothing on a CPU."""
    batch_max: int = Field(default=4, ge=1, le=64)
    """Images drawn together at most, where the warm-up found that it pays; 1 never does."""
    embedding_cache_mb: int = Field(default=64, ge=0)
    """Memory for the embeddings of prompts that come again."""
    prompt_tokens_max: int = Field(default=512, ge=16)
    """Tokens of a prompt that are read, as the model was trained; it may bear more."""

    # --- Times ---
    step_timeout_s: float = Field(default=120, gt=0)
    """A GPU that ends no step for this long is given up: the process exits."""
    store_timeout_s: float = Field(default=60, ge=0)
    """For how long a drawn image waits for an image store that is away."""

    # --- Prompt extension ---
    rewrite_url: HttpUrl | None = None
    """An OpenAI-compatible endpoint, up to and with `/v1`. None: the pipeline's text encoder."""
    rewrite_model: str = ""
    """The model that the endpoint is asked for."""
    rewrite_api_key: SecretStr | None = None
    rewrite_timeout_s: float = Field(default=60, gt=0)
    rewrite_reasoning_tokens_max: int = Field(default=1024, ge=0)
    """After so many the text encoder is told to come to its answer."""
    rewrite_tokens_max: int = Field(default=512, ge=16)
    """Tokens of the answer."""

    # --- Moderation ---
    moderation_rules: Path | None = None
    """A file of rules beside the built-in ones, or a folder of them."""
    moderation_classifier: str | None = None
    """An image-classification model: a hub id or a folder. None: images are not looked at."""
    moderation_labels: list[str] = ["nsfw"]
    """The labels of the classifier that are refused."""
    moderation_threshold: float = Field(default=0.9, ge=0, le=1)
    """Probability from which an image is refused."""
    moderation_strict_threshold: float = Field(default=0.5, ge=0, le=1)
    """The same for callers who asked for strict moderation."""
    moderation_log_prompts: bool = False
    """Whether the log of a refusal has the customer's text, and not only the rule."""

    # --- What is written into images ---
    metadata: bool = True
    """Model, seed, steps and task id, as PNG text or EXIF."""
    metadata_prompt: bool = False
    """The prompt as well."""
    ai_label: Literal["off", "metadata", "visible"] = "metadata"
    """Mark images as made by AI, as the EU and China ask for: in the metadata, or also visibly."""
    ai_label_text: str = Field(default="AI-generated", min_length=1, max_length=40)
    ai_label_font: Path | None = None
    """A font file that has the letters of `ai_label_text`. None: Pillow's own, which has ASCII and
    little more."""
    ai_label_producer: str = Field(default="", max_length=200)
    """Who answers for the images: the content producer in China's implicit label."""


settings = load(WorkerSettings)
