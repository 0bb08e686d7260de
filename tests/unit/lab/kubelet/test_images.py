"""Images without a command."""

import pytest

from vmnet.lab.kubelet import images


def test_a_command_needs_no_image() -> None:
    assert images.argv("no/such:image", ["a", "b"], ["c"]) == ("a", "b", "c")


def test_known_images_have_an_entry_point() -> None:
    assert images.argv("registry.k8s.io/pause:3.9", (), ()) == ("sleep", "infinity")
    words = images.argv("registry.k8s.io/e2e-test-images/agnhost:2.53@sha256:00", (), ("netexec", "--http-port=80"))
    assert words[1:] == ("-m", "vmnet.lab.kubelet.agnhost", "netexec", "--http-port=80")
    assert images.argv("agnhost", (), ())[-1] == "pause"


def test_unknown_ones_are_named() -> None:
    with pytest.raises(images.UnknownImage, match="nginx:1"):
        images.argv("nginx:1", (), ("x",))


@pytest.mark.parametrize("image", ["a", "a:1", "r:5000/a:1", "r/a@sha256:" + "0" * 64])
def test_every_image_id_ends_in_a_digest(image: str) -> None:
    name, _, digest = images.image_id(image).partition("@sha256:")
    assert len(digest) == 64
    assert name
    assert images.image_id(image) == images.image_id(image)
