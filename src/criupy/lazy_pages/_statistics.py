import enum
class State(enum.Enum):
    WAITING=0;RESTORING=1;TRANSFERRING=2;COMPLETE=3;ABORTED=4;FAILED=5
class Statistics:
    def __init__(self): self.raw=None; self.state=None
    @classmethod
    def from_pager(cls,raw,state):
        s=cls(); s.raw=raw; s.state=state; return s
    def with_state(self,state):
        self.state=state; return self
