from typing import Any

def decode_region(
    content: bytes, size: tuple[int, int], box: tuple[int, int, int, int], strip: Any, /
) -> None: ...
