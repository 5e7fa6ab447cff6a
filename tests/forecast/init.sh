#!/bin/busybox sh
# What the Linux guest does: one kind of work (`work=` on the kernel's command line), over and over.
/bin/busybox --install -s /bin
export PATH=/usr/bin:/bin HOME=/tmp
mount -t devtmpfs dev /dev
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t tmpfs tmp /tmp
ip link set lo up
cd /tmp
work=$(sed -n 's/.*work=\([a-z]*\).*/\1/p' /proc/cmdline)

# Some text and some noise: it can be compressed, but not by much.
data() {
  { seq 1 $((30000 * $1)); dd if=/dev/urandom bs=64k count=$((4 * $1)) 2>/dev/null; } >data
}

case $work in
idle)
  while :; do sleep 1; date >clock; done &
  ;;
gzip)
  data 16
  while :; do gzip -c data >data.gz; done &
  ;;
zstd)
  data 24
  while :; do zstd -q -f -3 -T1 data -o data.zst; done &
  ;;
xz)
  data 12
  while :; do /usr/bin/xz -3 -T1 -c data >data.xz; done &
  ;;
sqlite)
  sqlite3 base 'pragma journal_mode = memory; create table t (id integer primary key, n integer, text);
    with recursive c(x) as (select 1 union all select x + 1 from c where x < 60000)
    insert into t select x, random(), hex(randomblob(100)) from c; create index i on t (n);' >/dev/null
  while :; do
    awk -v seed=$((round += 1)) 'BEGIN { srand(seed); print "begin;"; for (i = 0; i < 200; i++) {
      id = int(rand() * 60000); print "update t set n = random(), text = hex(randomblob(100)) where id = " id ";" }
      print "select count(*) from t where n > 0; commit;" }'
  done | sqlite3 base >/dev/null &
  ;;
redis)
  redis-server --save '' --port 0 --unixsocket /tmp/redis --daemonize yes >/dev/null
  sleep 1
  redis-benchmark -s /tmp/redis -q -c 4 -t set -d 400 -r 60000 -n 8000 >/dev/null
  while :; do redis-benchmark -s /tmp/redis -q -c 4 -t set,get,lpush,lpop -d 400 -r 60000 -n 20000 >/dev/null; done &
  ;;
build)
  for file in $(seq 1 12); do
    awk -v file="$file" 'BEGIN { print "#include <stdio.h>\n#include <stdlib.h>\n#include <string.h>"; for (i = 0; i < 400; i++)
      printf "int f%d_%d(int n) { char b[64]; snprintf(b, sizeof b, \"%%d\", n); return n < 2 ? %d : strlen(b) + n; }\n",
        file, i, i
    }' >"part$file.c"
  done
  echo 'int f1_1(int); int main(void) { return f1_1(1) != 1; }' >main.c
  while :; do
    for file in $(seq 1 12); do tcc -c "part$file.c" -o "part$file.o"; done
    tcc -o program main.c part*.o && ./program && rm part*.o program
  done &
  ;;
esac
sleep 1
echo "READY $work" >/dev/ttyS0
while :; do sleep 1000; done
