"""A device of one stream, without torch: what it is asked takes its seconds, one after the other."""


class Device:
    """Only ``now_s``, and whoever waits for an event, moves it on."""

    def __init__(self):
        self.now_s = 0.0
        self.free_at_s = 0.0
        self.waited_for = []

    def work(self, seconds):
        self.free_at_s = max(self.free_at_s, self.now_s) + seconds

    def record(self):
        return Event(self, max(self.free_at_s, self.now_s))


class Event:
    def __init__(self, device, at_s):
        self.device, self.at_s = device, at_s

    def done(self):
        return self.device.now_s >= self.at_s

    def wait(self):
        self.device.waited_for.append(self.at_s)
        self.device.now_s = max(self.device.now_s, self.at_s)

    def seconds_after(self, earlier):
        assert self.done()
        assert earlier.done()
        return self.at_s - earlier.at_s
