"""A stream of batches with every batch changed."""

from cm.data.mapped import MappedStream, mapped


def test_batches_are_changed_from_the_start_asked_for_and_ended():
    def count(start):
        while True:
            yield start
            start += 1

    stream = mapped(count, lambda batch: batch * 10)(3)
    assert [next(stream), next(iter(stream))] == [30, 40]
    stream.close()
    assert list(stream.batches) == []
    MappedStream(iter([1]), str).close()                    # nothing to end
