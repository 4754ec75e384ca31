"""What the small sizes would break: by type of model, the keys that need another value."""

from typing import Any

EXCEPTIONS: dict[str, dict[str, Any]] = {}
