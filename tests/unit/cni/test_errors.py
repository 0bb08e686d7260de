"""CNI error JSON."""

import json

from vmnet.cni.errors import CniError, Code


def test_an_error_is_what_the_specification_prints() -> None:
    error = CniError(Code.TRY_AGAIN_LATER, "no allocation yet", "pod red/vm-0")
    assert json.loads(error.to_json("1.0.0")) == {
        "cniVersion": "1.0.0",
        "code": 11,
        "msg": "no allocation yet",
        "details": "pod red/vm-0",
    }
    assert "details" not in json.loads(CniError(Code.IO_FAILURE, "x").to_json())
