"""What launches kernels, imported when it is first needed: it needs jax-triton and triton, which CPUs do without."""

import importlib
from typing import Any

from ..base import versions
from ..base.errors import missing_triton_error


def launcher() -> Any:
    """The module `launch`.

    Raises:
      ImportError: jax-triton or triton is missing, too old, or so new that it lacks what is used here.
    """
    if old := list(versions.too_old(*versions.KERNELS)):
        raise missing_triton_error("; ".join(old))
    try:
        return importlib.import_module(".launch", __package__)
    except ImportError as error:
        raise missing_triton_error(error) from error
    except AttributeError as error:
        newer = list(versions.untested(*versions.KERNELS))
        if not newer:
            raise
        raise missing_triton_error("; ".join([str(error), *newer])) from error
