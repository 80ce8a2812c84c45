import sys,json,argparse,trio,os,logging,time,resource
ap=argparse.ArgumentParser()
ap.add_argument("--no-default-config",action="store_true")
ap.add_argument("-D"); ap.add_argument("-W"); ap.add_argument("-o"); ap.add_argument("-v4",action="store_true")
ap.add_argument("--page-server",action="store_true"); ap.add_argument("--address"); ap.add_argument("--port",type=int); ap.add_argument("--status-fd",type=int)
ap.add_argument("--display-stats",action="store_true")
ap.add_argument("--on-failure",default="poison"); ap.add_argument("--stats-file"); ap.add_argument("--stop-timeout",type=float,default=30); ap.add_argument("--link-timeout",type=float,default=30)
a=ap.parse_args()
logging.addLevelName(40,'Error')
logging.basicConfig(filename=os.path.join(a.W or a.D,a.o) if a.o else None,level=10,format="%(relativeCreated)d %(levelname)s (x.py:1) %(message)s")
from pathlib import Path
from criupy.lazy_pages._daemon_linux import *
async def main():
    c=Config(images_dir=Path(a.D),page_server=(a.address,a.port) if a.page_server else None,on_failure=a.on_failure,stop_timeout=a.stop_timeout,link_timeout=a.link_timeout)
    import signal
    async with trio.open_nursery() as n:
        async with open_lazy_pages(c,work_dir=a.W) as d:
            async def sigs():
                with trio.open_signal_receiver(signal.SIGTERM) as r:
                    async for _ in r: d.stop()
            n.start_soon(sigs)
            if a.status_fd is not None: os.write(a.status_fd,b"\0"); os.close(a.status_fd)
            await d.wait()
        n.cancel_scope.cancel()
    s=d._last.raw
    if a.stats_file:
        open(os.path.join(a.W,a.stats_file),"w").write(json.dumps(dict(pages_missing=s.pages_missing,pages_total=s.pages_total,pages_demand=s.pages_demand,pages_dropped=s.pages_dropped,events=dict(fork=s.nr_events_fork,remap=s.nr_events_remap,remove=s.nr_events_remove,unmap=s.nr_events_unmap))))
    ms=(s.drained_ns-s.finished_ns)/1e6
    def pct(p):
        tot=sum(s.latency); acc=0
        for i,x in enumerate(s.latency):
            acc+=x
            if acc>=tot*p: 
                return i if i<16 else ((16+i%16)<<(i//16+3-4))
    logging.info(f"drain {ms:.1f} ms pages {s.pages_received} demand {s.pages_demand} bg {s.pages_background} faults {s.nr_faults} req {s.nr_requests} dreq {s.nr_demand_requests} again {s.nr_again} rtt {s.rtt_ns} win {s.window_pages} p50 {pct(.5)} p99 {pct(.99)} max {s.latency_max_ns} sum {s.latency_sum_ns/1e6:.1f}ms cpu {time.process_time():.2f} rss {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss>>10}")

def run():
    try: trio.run(main)
    except* Exception as e:
        while isinstance(e,ExceptionGroup): e=e.exceptions[0]
        logging.error("%s",e,exc_info=e if "-x" in sys.argv else None); sys.exit(1)
run()
