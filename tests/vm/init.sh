#!/bin/busybox sh
# The initial RAM disk: load what the disks need, mount them, and hand over to the agent.
/bin/busybox --install -s /bin
mkdir -p /proc /dev /root
mount -t proc proc /proc
mount -t devtmpfs dev /dev
exec </dev/console >/dev/console 2>&1
for module in $(cat /modules/order); do
	insmod "/modules/$module"
done
mount -t ext4 /dev/vda /root
mount -t ext4 -o ro /dev/vdb /root/opt/criupy
mount -o move /dev /root/dev
umount /proc
exec switch_root /root /usr/bin/python3 -I /opt/criupy/agent.py
