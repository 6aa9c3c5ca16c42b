#!/bin/busybox sh
# /init of the initial RAM disk: load what reaches the root disk, mount it, become the agent.
# Everything is an applet of the static busybox that this shell is, which needs /proc/self/exe.

fail() {
	echo "holdfast: guest cannot start: $*"
	poweroff -f
}

/bin/busybox mount -t proc -o nosuid,nodev,noexec proc /proc
mount -t devtmpfs -o nosuid dev /dev

while read -r module; do
	insmod "$module" || fail "load $module"
done </stage1

# The driver finds the disk while it is being loaded; waiting is for a host that is slow beyond reason.
tries=0
until [ -b /dev/vda ]; do
	[ $tries -lt 250 ] || fail "the root disk /dev/vda did not appear within 5 s"
	tries=$((tries + 1))
	usleep 20000
done
mount -t erofs -o ro /dev/vda /root || fail "mount the root disk"

mount -t sysfs -o nosuid,nodev,noexec sys /root/sys
mount --move /dev /root/dev
mount --move /proc /root/proc
exec /bin/busybox switch_root /root @INTERPRETER@ -I -S /usr/lib/holdfast/agent
