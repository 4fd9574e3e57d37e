"""Files: whole or absent, and damage never goes unseen."""

import hashlib
import json
import math
import os
import struct
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from pyro_forget.store import atomic_write, digest, load_json, load_tensors, save_json, save_tensors

HEADER = {"kind": "sampled", "num_data": 3, "site": {"w": [1.5, None, True]}, "name": "γ"}


def some_tensors() -> dict[str, torch.Tensor]:
    values = torch.arange(12, dtype=torch.float64).reshape(3, 4)
    return {
        "b": values,
        "a": values.T[1:],  # a view that is not contiguous and shares memory with b
        "half": values.to(torch.bfloat16),
        "ids": torch.tensor([3, 1, 2]),
        "mask": torch.tensor([True, False]),
        "scalar": torch.tensor(-0.0),
        "none": torch.empty(0, 5),
    }


@pytest.fixture
def saved(tmp_path):
    return save_tensors(tmp_path / "posterior.safetensors", some_tensors(), HEADER)


class TestAtomicWrite:
    def test_writes_beside_and_replaces(self, tmp_path):
        path = tmp_path / "report.html"
        path.write_text("old")
        seen = []

        def writer(beside):
            seen.append(beside)
            assert path.read_text() == "old"
            beside.write_text("new")

        assert atomic_write(path, writer) == path
        assert path.read_text() == "new"
        assert seen[0].parent == tmp_path and seen[0].suffix == ".html" and seen[0] != path
        assert os.listdir(tmp_path) == ["report.html"]

    @pytest.mark.parametrize("error", [ValueError("disk full"), KeyboardInterrupt()])
    def test_failure_keeps_the_old_file_and_leaves_nothing(self, tmp_path, error):
        path = tmp_path / "report.html"
        path.write_text("old")

        def writer(beside):
            beside.write_text("half of the n")
            raise error

        with pytest.raises(type(error)):
            atomic_write(path, writer)
        assert path.read_text() == "old"
        assert os.listdir(tmp_path) == ["report.html"]

    def test_a_writer_that_writes_nothing_is_an_error(self, tmp_path):
        with pytest.raises(FileNotFoundError):
            atomic_write(tmp_path / "report.html", lambda beside: None)
        assert os.listdir(tmp_path) == []

    def test_missing_folder_is_named(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"create .*absent first"):
            atomic_write(tmp_path / "absent" / "report.html", lambda beside: beside.write_text("new"))

    @pytest.mark.skipif(os.name != "posix", reason="permissions of POSIX systems")
    def test_permissions_are_those_of_any_new_file(self, tmp_path):
        (tmp_path / "plain").write_text("")
        path = atomic_write(tmp_path / "atomic", lambda beside: beside.write_text(""))
        assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode


class TestJson:
    def test_round_trip(self, tmp_path):
        assert load_json(save_json(tmp_path / "a.json", HEADER)) == HEADER

    @pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
    def test_not_a_number_is_refused_where_it_stands(self, tmp_path, value):
        with pytest.raises(ValueError, match=r"table\.rows\[1\] cannot be written as JSON: it is -?(nan|inf)"):
            save_json(tmp_path / "a.json", {"table": {"rows": [1.0, value]}})
        assert os.listdir(tmp_path) == []

    @pytest.mark.parametrize("value", [torch.ones(2), {1, 2}, b"bytes", object()])
    def test_other_types_are_refused_where_they_stand(self, tmp_path, value):
        with pytest.raises(TypeError, match=r"error cannot be written as JSON.*numbers or lists"):
            save_json(tmp_path / "a.json", {"error": value})

    def test_keys_are_strings(self, tmp_path):
        with pytest.raises(TypeError, match="key 7 of digits"):
            save_json(tmp_path / "a.json", {"digits": {7: "seven"}})

    @pytest.mark.parametrize("text", ['{"a": 1', "", '{"a": NaN}', '{"a": Infinity}', "\x80PK"])
    def test_a_bad_file_is_named(self, tmp_path, text):
        (tmp_path / "a.json").write_bytes(text.encode("latin-1"))
        with pytest.raises(ValueError, match=r"a\.json is not the JSON it should be"):
            load_json(tmp_path / "a.json")

    def test_a_missing_file_is_missing(self, tmp_path):
        with pytest.raises(FileNotFoundError):
            load_json(tmp_path / "a.json")


class TestTensors:
    def test_round_trip_to_the_bit(self, saved):
        tensors, header = load_tensors(saved)
        assert header == HEADER
        assert tensors.keys() == some_tensors().keys()
        for name, value in some_tensors().items():
            assert tensors[name].dtype == value.dtype and tensors[name].shape == value.shape
            assert digest({"": tensors[name]}, {}) == digest({"": value}, {})

    def test_what_is_loaded_does_not_hang_on_the_file(self, saved):
        tensors, _ = load_tensors(saved)
        saved.write_bytes(b"")
        assert torch.equal(tensors["b"], some_tensors()["b"])

    def test_gradients_and_parameters_are_left_behind(self, tmp_path):
        path = save_tensors(tmp_path / "a", {"w": torch.nn.Parameter(torch.ones(2))}, {})
        assert not load_tensors(path)[0]["w"].requires_grad

    def test_the_arguments_stay_as_they_were(self, tmp_path):
        tensors, header = some_tensors(), dict(HEADER)
        before = digest(tensors, header)
        save_tensors(tmp_path / "a", tensors, header)
        assert digest(tensors, header) == before and not tensors["a"].is_contiguous()

    def test_every_cut_is_seen(self, saved):
        whole = saved.read_bytes()
        for length in [0, 4, 8, 40, len(whole) // 2, len(whole) - 1]:
            saved.write_bytes(whole[:length])
            with pytest.raises(ValueError, match=rf"safetensors file of {length} bytes .*cut off"):
                load_tensors(saved)

    def test_every_changed_byte_is_seen(self, saved):
        whole = saved.read_bytes()
        for position in range(len(whole)):
            damaged = bytearray(whole)
            damaged[position] ^= 1
            saved.write_bytes(damaged)
            with pytest.raises(ValueError, match=r"posterior\.safetensors .*(Restore|Load it with)"):
                load_tensors(saved)

    def test_a_changed_header_is_seen(self, saved):
        whole = saved.read_bytes()
        assert b'num_data\\":3' in whole
        saved.write_bytes(whole.replace(b'num_data\\":3', b'num_data\\":4'))
        with pytest.raises(ValueError, match="damaged or changed"):
            load_tensors(saved)

    def test_a_changed_name_is_seen(self, saved):
        saved.write_bytes(saved.read_bytes().replace(b'"ids"', b'"idz"'))
        with pytest.raises(ValueError, match="damaged or changed"):
            load_tensors(saved)

    def test_a_safetensors_file_of_another_program(self, tmp_path):
        save_file({"w": torch.ones(2)}, tmp_path / "a.safetensors", metadata={"format": "pt"})
        with pytest.raises(ValueError, match="its format is 'pt', 'pyro-forget 1' was expected"):
            load_tensors(tmp_path / "a.safetensors")

    def test_a_pickle_is_not_opened(self, tmp_path):
        torch.save({"w": torch.ones(2)}, tmp_path / "a.pt")
        with pytest.raises(ValueError, match="another program wrote it"):
            load_tensors(tmp_path / "a.pt")

    def test_a_missing_file_is_missing(self, tmp_path):
        with pytest.raises(FileNotFoundError):
            load_tensors(tmp_path / "a.safetensors")

    def test_other_programs_can_read_the_tensors(self, saved):
        assert torch.equal(load_file(saved)["b"], some_tensors()["b"])

    def test_a_header_that_is_no_json_is_refused(self, tmp_path):
        with pytest.raises(ValueError, match="elbo cannot be written"):
            save_tensors(tmp_path / "a", {}, {"elbo": math.nan})


class TestDigest:
    def test_against_a_stream_written_by_hand(self):
        """What a file of today records must be found by any machine and any later version."""
        tensors = {"loc": torch.tensor([[1.0, -2.5]], dtype=torch.float32), "ids": torch.tensor([1, 2])}
        index = r'{"header":{"a":1,"\u03c0":0.1},"tensors":[["ids","torch.int64",[2]],["loc","torch.float32",[1,2]]]}'
        stream = index.encode() + struct.pack("<2q", 1, 2) + struct.pack("<2f", 1.0, -2.5)
        assert digest(tensors, {"π": 0.1, "a": 1}) == hashlib.sha256(stream).hexdigest()

    def test_order_of_names_and_keys_does_not_matter(self):
        forward = some_tensors()
        backward = dict(reversed(forward.items()))
        assert digest(forward, HEADER) == digest(backward, dict(reversed(HEADER.items())))

    @pytest.mark.parametrize(
        "tensors",
        [
            {"v": torch.zeros(4)},
            {"w": torch.zeros(2, 2)},
            {"w": torch.zeros(4, dtype=torch.float32)},
            {"w": torch.tensor([0.0, 0.0, 0.0, -0.0])},
            {"w": torch.zeros(2), "x": torch.zeros(2)},
            {},
        ],
    )
    def test_names_types_shapes_and_bits_matter(self, tensors):
        assert digest(tensors, {}) != digest({"w": torch.zeros(4, dtype=torch.float64)}, {})

    def test_conjugate_views_are_read_as_their_values(self):
        value = torch.tensor([1 + 2j, 3 - 1j])
        assert digest({"z": value.conj()}, {}) == digest({"z": value.conj().resolve_conj().clone()}, {})
        assert digest({"z": value.conj()}, {}) != digest({"z": value}, {})

    def test_another_process_gives_the_same(self):
        code = "import torch; from pyro_forget.store import digest; print(digest({'w': torch.arange(3)}, {'a': 'é'}))"
        other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert other.stdout.strip() == digest({"w": torch.arange(3)}, {"a": "é"})

    def test_header_must_be_json(self):
        with pytest.raises(TypeError, match="ids cannot be written"):
            digest({}, {"ids": torch.ones(2)})


def test_json_is_readable_by_people(tmp_path):
    text = save_json(tmp_path / "a.json", {"name": "γ"}).read_text(encoding="utf-8")
    assert text == '{\n  "name": "γ"\n}\n' and json.loads(text) == {"name": "γ"}
