"""The devices that a user names."""

import torch


def usable_device(key: str, name: str) -> torch.device:
    """The device with a name.

    Args:
        key: the config key or option that names it, for the message.

    Raises:
        ValueError: torch knows no such device, or it is neither a CPU nor a CUDA device and can't
            be used here; one line.
    """
    try:
        device = torch.device(name)
        if device.type not in ("cpu", "cuda"):
            torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as e:
        raise ValueError(f"{key} must be such as cpu, cuda or cuda:1; got {name!r}") from e
    return device


def device_here(key: str, name: str | None) -> str:
    """Check the name of a device of this machine, and return it; for None, a GPU if there is one.

    Raises:
        ValueError: see ``usable_device``, or there is no such GPU here; one line.
    """
    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    device, gpus = usable_device(key, name), torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= gpus:
        raise ValueError(f"{key} is {name!r}, but torch sees {gpus} GPUs here; use cpu")
    return name
