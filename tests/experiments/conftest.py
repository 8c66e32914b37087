"""Models and data that are only read, made once."""

import pytest

from tests.experiments.small import write_classifier, write_generator


@pytest.fixture(scope="session")
def classifier(tmp_path_factory):
    return write_classifier(tmp_path_factory.mktemp("classifier"))


@pytest.fixture(scope="session")
def generator(tmp_path_factory):
    return write_generator(tmp_path_factory.mktemp("generator"))
