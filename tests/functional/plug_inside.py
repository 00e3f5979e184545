import time
t=time.time()
import json, sys
import pyroute2.netlink.rtnl.tcmsg
import nova_pmt.guest.network.base
if __name__ == "__main__":
    print(json.dumps({"import": time.time()-t, "up": open("/proc/uptime").read(), "v": sys.version}))
