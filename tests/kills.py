import json, os, random, signal, time, threading, multiprocessing as mp
from pathlib import Path
import pytest, sys
import shardproof as sp
from shardproof.errors import RankError
from shardproof.checkpoint.manifest import find_damage
from shardproof.checkpoint import directory as D
from test_checkpoint import cut, train, trained, hashes
N=int(os.environ.get("KILLS","100"))
def work(axis, path, pids):
    (Path(pids)/f"{axis.rank}").write_text(str(os.getpid()))
    m,o=cut(axis); step=sp.load(path,m,o).step
    (Path(pids)/f"ready{axis.rank}").write_text("x")
    while True:
        train(m,o,range(step,step+1)); step+=1
        sp.save(path,m,o,step=step)
def test_kills(tmp_path, pool):
    path=tmp_path/"here"; pool(1,"threads").run(lambda a: trained(a,path,range(1)))
    random.seed(1); states={"work":0,"previous":0,"clean":0}
    for k in range(N):
        pids=tmp_path/f"p{k}"; pids.mkdir(); victim=k%3
        def killer():
            while not all((pids/f"ready{r}").exists() for r in range(3)): time.sleep(0.002)
            time.sleep(random.random()*0.15)
            os.kill(int((pids/str(victim)).read_text()),signal.SIGKILL)
        t=threading.Thread(target=killer); t.start()
        with pytest.raises(RankError):
            sp.launch(lambda a: work(a,str(path),str(pids)),degree=3,engine="processes",transport="auto" if k%2 else "gloo")
        t.join()
        w,p=D.work_of(path).exists(),D.previous_of(path).exists()
        states["previous" if p else "work" if w else "clean"]+=1
        D.recover(path)
        assert find_damage(path)==[]
        print(k,json.loads((path/"shardproof.json").read_text())["step"],w,p,flush=True)
    last=json.loads((path/"shardproof.json").read_text())["step"]
    alone=tmp_path/"alone"; pool(1,"threads").run(lambda a: trained(a,alone,range(last)))
    a,b=hashes(alone),hashes(path)
    assert a["model.safetensors"]==b["model.safetensors"] and a["optimizer.safetensors"]==b["optimizer.safetensors"]
    print("STATES",states,"last step",last)
