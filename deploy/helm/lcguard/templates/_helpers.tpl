{{- define "lcguard.name" -}}
{{- printf "%s-%s" .Release.Name "lcguard" | trunc 40 | trimSuffix "-" -}}
{{- end -}}

{{- /* What selects the pods of one part: dict "root" $ "part" "proxy". */ -}}
{{- define "lcguard.selector" -}}
app.kubernetes.io/name: lcguard
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .part }}
{{- end -}}

{{- define "lcguard.labels" -}}
{{ include "lcguard.selector" . }}
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
helm.sh/chart: {{ .root.Chart.Name }}-{{ .root.Chart.Version }}
{{- end -}}

{{- define "lcguard.image" -}}
{{- $image := index .root.Values.images .part -}}
{{ $image.repository }}@{{ required (printf "images.%s.digest: name the image by digest, sha256:..." .part) $image.digest }}
{{- end -}}

{{- define "lcguard.secret" -}}
{{- .Values.secret.existing | default (include "lcguard.name" .) -}}
{{- end -}}

{{- define "lcguard.store" -}}
{{- if .Values.store.enabled -}}
redis://{{ include "lcguard.name" . }}-store:6379/0
{{- else -}}
{{ .Values.store.url }}
{{- end -}}
{{- end -}}

{{- define "lcguard.guards" -}}
{{- $guards := dict -}}
{{- range $name, $folder := .Values.model.guards -}}
{{- $_ := set $guards $name (printf "/models/%s" $folder) -}}
{{- end -}}
{{- toJson $guards -}}
{{- end -}}

{{- /* server.yaml: what is the chart's to say wins over `config`, which the schema keeps apart. */ -}}
{{- define "lcguard.server" -}}
{{- $name := include "lcguard.name" . -}}
{{- $engine := dict "model" (printf "/models/%s" .Values.model.path) "served_model_name" .Values.model.name "guards" (include "lcguard.guards" . | fromJson) "unproven" .Values.model.unproven -}}
{{- $fixed := dict "host" "0.0.0.0" "port" .Values.proxy.port "policy" "/config/policy.yaml" "keys" "/keys/keys.yaml" "store" (include "lcguard.store" .) "drain_s" .Values.proxy.drainSeconds "upstream" (dict "url" (printf "http://%s-engine:%v" $name .Values.engine.port)) "engine" $engine -}}
{{- mustMergeOverwrite (deepCopy .Values.config) $fixed | toYaml -}}
{{- end -}}

{{- define "lcguard.pod-security" -}}
runAsNonRoot: true
runAsUser: 10001
runAsGroup: 10001
fsGroup: 10001
seccompProfile: {type: RuntimeDefault}
{{- end -}}

{{- define "lcguard.container-security" -}}
readOnlyRootFilesystem: true
allowPrivilegeEscalation: false
capabilities: {drop: [ALL]}
{{- end -}}

{{- /* Of one part: where it is placed, and whom it pulls its image as. */ -}}
{{- define "lcguard.placement" -}}
{{- $part := index .root.Values .part -}}
automountServiceAccountToken: false
enableServiceLinks: false
{{- with .root.Values.images.pullSecrets }}
imagePullSecrets:
{{- range . }}
  - name: {{ . }}
{{- end }}
{{- end }}
{{- with $part.nodeSelector }}
nodeSelector: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with $part.tolerations }}
tolerations: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with $part.affinity }}
affinity: {{- toYaml . | nindent 2 }}
{{- end }}
{{- end -}}

{{- define "lcguard.key" -}}
valueFrom: {secretKeyRef: {name: {{ include "lcguard.secret" .root }}, key: {{ .key }}}}
{{- end -}}
